"""Teach a converted network its original's outputs, on unlabeled images."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from normswap.networks.hooks import outputs_of
from normswap.networks.inputs import batch_size, call, tensors_in
from normswap.networks.network import Network
from normswap.networks.processes import averaged, joined, own_rows, summed
from normswap.networks.randomness import uniform

LEARNING_RATES = (1.5e-3, 3e-4, 6e-5, 1.2e-5)
"""Adam's highest learning rate; it falls to zero along a cosine. The closer the start, the lower the one it bears."""

HINTS, HINT_WEIGHT = 8, 30
"""Norms drawn for every step, and the weight of their outputs against the network's. Outputs alone are learned by heart
from a few hundred images; what every layer computes carries over to others."""

MIXED = 0.5
"""Largest share of another sample that is mixed into each."""


def disagreement(student: Any, teacher: Any) -> Tensor | None:
    """Return the mean square difference of two outputs over the teacher's variance; 1 is as far as a constant is off.

    Nested outputs are compared tensor by tensor and averaged; whole numbers and mismatched sizes (detections) are left
    out. None where nothing is left. Where processes work together, the variance is that of all their samples.
    """
    terms = [
        (s.float() - t.float()).square().mean() / _variance(t.float()).clamp_min(1e-12)
        for s, t in zip(tensors_in(student), tensors_in(teacher), strict=False)
        if t.is_floating_point() and s.shape == t.shape and t.numel()
    ]
    return torch.stack(terms).mean() if terms else None


@torch.no_grad()
def _variance(values: Tensor) -> Tensor:
    """Return the mean variance over samples, axis 0, of all processes."""
    count = summed(values.new_tensor(float(len(values))))
    mean = summed(values.sum(0)) / count
    return summed((values - mean).square().sum()) / (count * max(mean.numel(), 1))


def mixed(batch: Any, generator: torch.Generator | None = None) -> Any:
    """Return the batch with a random share of another sample in each; whole numbers and single values stay.

    The teacher answers any input, so mixtures cost nothing and keep the student from learning images by heart (Beyer et
    al. 2022, arXiv 2106.05237, "function matching"). Where processes work together, all their samples are mixed.

    Args:
        batch: Example inputs; tensors of more than one axis hold a sample per row.
        generator: Source of the shares, alike in all processes.
    """
    size = batch_size(batch)
    share = MIXED * uniform((len(joined(torch.empty(size))),), generator)

    def mix(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or tensor.ndim < 2 or len(tensor) != size:
            return tensor
        every = joined(tensor)
        weight = share.to(tensor).view(-1, *(1 for _ in tensor.shape[1:]))
        return own_rows(torch.lerp(every, every.flip(0), weight))

    return tree_map_only(Tensor, mix, batch)


def distill(
    student: Network,
    teacher: Network,
    names: Iterable[str],
    batches: Iterable[Any],
    *,
    steps: int,
    rate: float,
    seed: int = 0,
    precision: AbstractContextManager[Any] | None = None,
) -> None:
    """Train the student's parameters for some steps to give the teacher's outputs.

    The loss is `disagreement` of the outputs plus, 30 times, its mean over the outputs of 8 norms drawn anew for every
    step (Romero et al. 2015, arXiv 1412.6550, hints); Adam, its rate falling along a cosine, gradients clipped to
    norm 1. Where processes work together, each sees batches of its own, of one size, and the step is the one
    that all their samples together ask for.

    Args:
        student: The converted network in eval mode; its parameters change.
        teacher: The original in eval mode.
        names: Norms whose outputs are compared too.
        batches: Example inputs; at least `steps` of them are taken.
        steps: Optimizer steps.
        rate: The highest learning rate.
        seed: Of the mixtures and of the norms that are drawn.
        precision: Entered around forward passes, such as `torch.autocast`.
    """
    norms, theirs = ({name: network.slots[name] for name in names} for network in (student, teacher))
    for norm in norms.values():  # a frozen BatchNorm's values are fixed, what replaced it has to find its own
        norm.requires_grad_()
    parameters = [p for p in student.model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    precision = precision or torch.autocast("cpu", enabled=False)
    with outputs_of(norms) as found, outputs_of(theirs) as wanted:
        for _, batch in zip(range(steps), batches, strict=False):
            batch = mixed(batch, generator)
            with precision:
                with torch.no_grad():
                    answer = call(teacher.model, batch)
                outputs = disagreement(call(student.model, batch), answer)
            drawn = [list(norms)[index] for index in torch.randperm(len(norms), generator=generator)[:HINTS]]
            hints = disagreement([found.get(name) for name in drawn], [wanted.get(name) for name in drawn])
            terms = [weight * term for weight, term in ((1, outputs), (HINT_WEIGHT, hints)) if term is not None]
            optimizer.zero_grad()
            torch.stack(terms).sum().backward()
            averaged([p.grad for p in parameters if p.grad is not None])
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
