"""Teach a converted network its original's outputs, on unlabeled images."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from normswap.inputs import call
from normswap.tensors import tensors_in

LEARNING_RATE = 1e-3
"""Adam's highest learning rate; it falls to zero along a cosine."""


def disagreement(student: Any, teacher: Any) -> Tensor | None:
    """Return the mean square difference of two outputs over the teacher's variance; 1 is as far as a constant is off.

    Nested outputs are compared tensor by tensor and averaged; whole numbers and mismatched sizes (detections) are left
    out. None where nothing is left.
    """
    terms = [
        (s.float() - t.float()).square().mean() / (t.float() - t.float().mean(0)).square().mean().clamp_min(1e-12)
        for s, t in zip(tensors_in(student), tensors_in(teacher), strict=False)
        if t.is_floating_point() and s.shape == t.shape and t.numel()
    ]
    return torch.stack(terms).mean() if terms else None


class Outputs:
    """The outputs of the named norms of one network in its last forward pass."""

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        modules = dict(model.named_modules(remove_duplicate=False))
        self.found: dict[str, Any] = {}
        self.handles = [modules[name].register_forward_hook(self._keeper(name)) for name in names]

    def _keeper(self, name: str) -> Any:
        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            self.found[name] = output

        return keep

    def remove(self) -> None:
        """Stop watching."""
        for handle in self.handles:
            handle.remove()


def _sum(*terms: Tensor | None) -> Tensor:
    return torch.stack([term for term in terms if term is not None]).sum()


def distill(
    student: nn.Module, teacher: nn.Module, names: Iterable[str], batches: Iterable[Any], *, steps: int
) -> None:
    """Train the student's parameters for some steps to give the teacher's outputs.

    The loss is `disagreement` of the outputs plus its mean over the norms' outputs (Romero et al. 2015,
    arXiv 1412.6550, hints); Adam, learning rate 1e-3 falling along a cosine, gradients clipped to norm 1.

    Args:
        student: The converted network in eval mode; its parameters change.
        teacher: The original in eval mode.
        names: Norms whose outputs are compared too.
        batches: Example inputs; at least `steps` of them are taken.
        steps: Optimizer steps.
    """
    names = list(names)
    modules = dict(student.named_modules(remove_duplicate=False))
    for name in names:  # a frozen BatchNorm's values are fixed, what replaced it has to find its own
        modules[name].requires_grad_()
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    ours, theirs = Outputs(student, names), Outputs(teacher, names)
    try:
        for _, batch in zip(range(steps), batches, strict=False):
            with torch.no_grad():
                wanted = call(teacher, batch)
            loss = _sum(disagreement(call(student, batch), wanted), disagreement(ours.found, theirs.found))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
    finally:
        ours.remove()
        theirs.remove()
