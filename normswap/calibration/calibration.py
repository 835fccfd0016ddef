"""Bring a converted network closer to its original with unlabeled images: match moments, then distill."""

import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

from normswap.calibration.distillation import Outputs, disagreement, distill
from normswap.calibration.moments import match_moments
from normswap.conversion.surgery import plan_of, verify
from normswap.errors import CalibrationFailed, InvalidOption
from normswap.networks.copying import copy_model
from normswap.networks.inputs import batch_size, call
from normswap.networks.validation import unwrap
from normswap.planning.plan import Action

EVERY, HELD_BACK = 5, 4
"""Every fifth batch is held back to judge by, four at most: memory does not grow with the number of images."""


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
        PlanMismatch: The networks do not belong together.
        CalibrationFailed: There are too few images, or no outputs to compare.
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
    verify(unwrap(original), plan)
    norms = [entry.name for entry in plan.norms if entry.action is Action.GROUP_NORM and entry.shape is not None]
    student, teacher = _working_copy(unwrap(converted)), _working_copy(unwrap(original))
    like = next(student.parameters())
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        images = _Split(_Prepared(batches, like), None if held_back is None else _Prepared(held_back, like))
        states = {"converted": _state(student)}
        passed = tqdm(images.once(), "matching", unit="batch", disable=None, leave=False)
        match_moments(student, teacher, norms, passed)
        states["matched"] = _state(student)
        scores = {stage: _score(student, teacher, norms, images.judged, state) for stage, state in states.items()}
        if steps:
            student.load_state_dict(states[min(scores, key=scores.__getitem__)])
            again = tqdm(islice(images.forever(), steps), "distilling", steps, unit="step", disable=None, leave=False)
            distill(student, teacher, norms, again, steps=steps)
            states["distilled"] = _state(student)
            scores["distilled"] = _score(student, teacher, norms, images.judged, states["distilled"])
    kept = min(scores, key=scores.__getitem__)
    if kept != "converted":
        _load(unwrap(converted), states[kept])
    return Calibration(scores, kept)


class _Prepared:
    """Batches without labels, on the device and in the floating type of a parameter."""

    def __init__(self, batches: Iterable[Any], like: Tensor) -> None:
        self.batches, self.like = batches, like

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            labelled = isinstance(batch, list) and len(batch) == 2 and not batch[1].is_floating_point()
            yield tree_map_only(Tensor, self._moved, batch[0] if labelled else batch)

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.like) if tensor.is_floating_point() else tensor.to(self.like.device)


class _Split:
    """Batches to judge by, and the others, which are all that is learned from."""

    def __init__(self, batches: Iterable[Any], judged: Iterable[Any] | None) -> None:
        self.batches = batches
        self._source = iter(batches)
        self._first = list(islice(self._source, EVERY * HELD_BACK))
        self._held: set[int] = set()
        if judged is not None:
            self.judged = list(judged)
        elif len(self._first) > 1:
            last = len(self._first) - 1
            self._held = set(range(EVERY - 1, len(self._first), EVERY)) or {last}
            self.judged = [self._first[index] for index in sorted(self._held)]
        else:
            self._halve()
        if not self.judged or not self._first:
            raise CalibrationFailed("calibration needs images to learn from and images to judge by; pass more batches")

    def _halve(self) -> None:
        half = batch_size(self._first[0]) // 2 if self._first else 0
        if not half:
            raise CalibrationFailed("calibration needs at least two images, one of them to judge by; pass more")
        self.judged = [_rows(self._first[0], slice(half, None))]
        self.batches = self._first = [_rows(self._first[0], slice(half))]

    def once(self) -> Iterator[Any]:
        """Yield the others in one pass; the iterable is not started anew."""
        yield from (batch for index, batch in enumerate(self._first) if index not in self._held)
        yield from self._source

    def forever(self) -> Iterator[Any]:
        """Yield the others again and again."""
        while True:
            yield from (batch for index, batch in enumerate(self.batches) if index not in self._held)


def _rows(batch: Any, rows: slice) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor[rows], batch)


def _working_copy(model: nn.Module) -> nn.Module:
    """Copy a network in eval mode; half precision becomes float32, in which small steps are not lost."""
    copy = copy_model(model).eval()
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in copy.parameters())
    return copy.float() if half else copy


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


@torch.no_grad()
def _load(model: nn.Module, state: dict[str, Tensor]) -> None:
    for key, value in model.state_dict().items():
        value.copy_(state[key])


@torch.no_grad()
def _score(
    student: nn.Module, teacher: nn.Module, norms: list[str], judged: list[Any], state: dict[str, Tensor]
) -> float:
    """Return the mean disagreement of the outputs; of the norms' outputs where those cannot be compared."""
    student.load_state_dict(state)
    ours, theirs = Outputs(student, norms), Outputs(teacher, norms)
    scores = []
    try:
        for batch in judged:
            score = disagreement(call(student, batch), call(teacher, batch))
            scores.append(disagreement(ours.found, theirs.found) if score is None else score)
    finally:
        ours.remove()
        theirs.remove()
    found = [float(score) for score in scores if score is not None]
    if not found:
        raise CalibrationFailed("the networks' outputs cannot be compared: no tensors of floats alike in shape")
    mean = sum(found) / len(found)
    return mean if math.isfinite(mean) else math.inf
