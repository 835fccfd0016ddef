"""Bring a converted network closer to its original with unlabeled images: match moments, then distill."""

import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from normswap.calibration.batches import Prepared, Split
from normswap.calibration.distillation import disagreement, distill
from normswap.conversion.carried_plan import must_fit, plan_of
from normswap.conversion.moments import match_moments
from normswap.errors import CalibrationFailed, InvalidOption
from normswap.networks.copying import copy_model, in_mode
from normswap.networks.hooks import outputs_of
from normswap.networks.inputs import call
from normswap.networks.network import Network
from normswap.networks.validation import unwrap
from normswap.planning.choices import Action


@dataclass(frozen=True)
class Calibration:
    """Disagreement with the original on images held back, by stage, and the stage that was kept.

    Attributes:
        scores: Mean square difference of the outputs over the variance of the original's, by stage.
        kept: The best stage: ``"converted"`` (nothing helped), ``"matched"`` or ``"distilled"``.
    """

    scores: dict[str, float]
    kept: str

    def to_dict(self) -> dict[str, Any]:
        """Return JSON data."""
        return asdict(self)

    def __str__(self) -> str:
        """Return one line for people."""
        stages = ", ".join(f"{stage} {score:.3g}" for stage, score in self.scores.items())
        return f"disagreement with the original on images held back: {stages}; kept: {self.kept}"


def calibrate(
    converted: nn.Module,
    original: nn.Module,
    batches: Iterable[Any],
    *,
    steps: int = 0,
    seed: int = 0,
    held_back: Iterable[Any] | None = None,
) -> nn.Module:
    """Bring `converted` closer to `original` on unlabeled batches; it is changed in place and returned.

    >>> calibrate(converted, model, DataLoader(images, batch_size=32), steps=300)

    One pass gives every norm the moments that the original's activations have on the same images; with `steps`, the
    original's outputs are then distilled into all parameters. What was best on the batches held back is kept, which
    may be the network as it was; a warning says so. Both networks keep their modes; `original` is only read.

    Args:
        converted: A network that `normswap.convert` returned.
        original: The network it was converted from.
        batches: Tensors, tuples of arguments or dicts of keyword arguments; labels of a list ``[images, labels]`` are
            left out. With `steps` they are gone through as often as it takes, so a generator does not do.
        steps: Steps of distillation, one batch each.
        seed: Of the random numbers that `batches` draws (shuffling, augmentation).
        held_back: Batches to judge by, a few; by default every fifth of `batches`, up to four, by their place in it.

    Raises:
        InvalidOption: `steps` is negative, or a generator is to be gone through several times.
        PlanMismatch: The networks do not belong together.
        CalibrationFailed: There are too few images, or no outputs to compare.
        UnsupportedModel: A network cannot be copied.
    """
    result = calibration(converted, original, batches, steps=steps, seed=seed, held_back=held_back)
    if result.kept == "converted":
        warnings.warn(f"calibration did not help and nothing was changed; {result}", stacklevel=2)
    return converted


def calibration(
    converted: nn.Module,
    original: nn.Module,
    batches: Iterable[Any],
    *,
    steps: int = 0,
    seed: int = 0,
    held_back: Iterable[Any] | None = None,
) -> Calibration:
    """Calibrate like `calibrate` and return what was measured."""
    if steps < 0:
        raise InvalidOption(f"steps={steps} must not be negative")
    if steps and isinstance(batches, Iterator):
        raise InvalidOption("steps= goes through the batches many times; pass a list or a DataLoader, no generator")
    plan = plan_of(converted)
    must_fit(Network(unwrap(original)), plan)
    norms = [entry.name for entry in plan.norms if entry.action is Action.GROUP_NORM and entry.shape is not None]
    student, teacher = _working_copy(unwrap(converted)), _working_copy(unwrap(original))
    like = next(student.model.parameters())
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        images = Split(Prepared(batches, like), None if held_back is None else Prepared(held_back, like))
        states = {"converted": _state(student.model)}
        passed = tqdm(images.once(), "matching", unit="batch", disable=None, leave=False)
        match_moments(student, teacher, norms, passed)
        states["matched"] = _state(student.model)
        scores = {stage: _score(student, teacher, norms, images.judged, state) for stage, state in states.items()}
        if steps:
            student.model.load_state_dict(states[min(scores, key=scores.__getitem__)])
            again = tqdm(islice(images.forever(), steps), "distilling", steps, unit="step", disable=None, leave=False)
            distill(student, teacher, norms, again, steps=steps)
            states["distilled"] = _state(student.model)
            scores["distilled"] = _score(student, teacher, norms, images.judged, states["distilled"])
    kept = min(scores, key=scores.__getitem__)
    if kept != "converted":
        _load(unwrap(converted), states[kept])
    return Calibration(scores, kept)


def _working_copy(model: nn.Module) -> Network:
    """Copy a network in eval mode; half precision becomes float32, in which small steps are not lost."""
    copy = in_mode(copy_model(model), False)
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in copy.parameters())
    return Network(copy.float() if half else copy)


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


@torch.no_grad()
def _load(model: nn.Module, state: dict[str, Tensor]) -> None:
    for key, value in model.state_dict().items():
        value.copy_(state[key])


@torch.no_grad()
def _score(student: Network, teacher: Network, norms: list[str], judged: list[Any], state: dict[str, Tensor]) -> float:
    """Return the mean disagreement of the outputs; of the norms' outputs where those cannot be compared."""
    student.model.load_state_dict(state)
    watched = ({name: network.slots[name] for name in norms} for network in (student, teacher))
    scores = []
    with outputs_of(next(watched)) as ours, outputs_of(next(watched)) as theirs:
        for batch in judged:
            score = disagreement(call(student.model, batch), call(teacher.model, batch))
            scores.append(disagreement(ours, theirs) if score is None else score)
    found = [float(score) for score in scores if score is not None]
    if not found:
        raise CalibrationFailed("the networks' outputs cannot be compared: no tensors of floats alike in shape")
    mean = sum(found) / len(found)
    return mean if math.isfinite(mean) else math.inf
