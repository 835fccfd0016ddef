"""Bring a converted network closer to its original with unlabeled images: equalize, align the norms, then distill."""

import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from normswap.calibration.batches import Split
from normswap.calibration.distillation import LEARNING_RATES, disagreement, distill
from normswap.calibration.supply import PASSES, with_made_up
from normswap.conversion.carried_plan import carry_plan, must_fit, plan_of
from normswap.conversion.moments import alignable, match_moments
from normswap.conversion.pipeline import apply, convert
from normswap.errors import CalibrationFailed, InvalidOption, described
from normswap.networks.copying import copy_model, in_mode
from normswap.networks.hooks import outputs_of
from normswap.networks.inputs import call, fresh, rebuild
from normswap.networks.network import Network
from normswap.networks.processes import processes, summed
from normswap.networks.settings import own_settings
from normswap.networks.surroundings import undisturbed
from normswap.networks.validation import must_have_data, unwrap
from normswap.planning.choices import Affine
from normswap.planning.measuring import Prepared, first_batches, must_be_batches
from normswap.planning.plan import Plan

TRIALS = 20
"""Each learning rate is tried for one step in so many, and the best one gets the rest."""


@dataclass(frozen=True)
class Calibration:
    """Disagreement with the original on images held back, by stage, and the stage that was kept.

    Attributes:
        scores: Mean square difference of the outputs over the variance of the original's, by stage.
        kept: The best stage: ``"converted"`` (nothing helped), ``"equalized"``, ``"matched"`` or ``"distilled"``.
        interrupted: Whether Ctrl-C ended it early.
    """

    scores: dict[str, float]
    kept: str
    interrupted: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return JSON data."""
        return asdict(self)

    def __str__(self) -> str:
        """Return one line for people."""
        stages = ", ".join(f"{stage} {score:.3g}" for stage, score in self.scores.items())
        ended = "; interrupted, and what was best so far stays" if self.interrupted else ""
        return f"disagreement with the original on images held back: {stages}; kept: {self.kept}{ended}"


def calibrate(
    converted: nn.Module,
    original: nn.Module,
    batches: Iterable[Any],
    *,
    steps: int = 0,
    seed: int = 0,
    held_back: Iterable[Any] | None = None,
    mixed_precision: bool | None = None,
    made_up: bool = False,
) -> nn.Module:
    """Bring `converted` closer to `original` on unlabeled batches; it is changed in place and returned.

    >>> calibrate(converted, model, DataLoader(images, batch_size=32, shuffle=True), steps=300)

    A network as `normswap.convert` returned it is equalized anew on the first 256 samples (scales, signs, and group
    counts where they are ``"auto"``), and every norm's affine values are set by least squares towards the original's
    outputs; of a network that was trained since, only the latter. With `steps`, the original's outputs are then
    distilled into all parameters. What was best on the batches held back is kept, which may be the network as it was; a
    warning says so. Both networks keep their modes; `original` is only read.

    Under ``torchrun``, with a process group set up and batches of its own, of one size, in every process, all work on
    one result, the one that a single process would get from all batches.

    Ctrl-C during distillation ends it and keeps the best so far.

    Args:
        converted: A network that `normswap.convert` returned.
        original: The network it was converted from, on the same device.
        batches: Tensors, tuples of arguments or dicts of keyword arguments; labels of a list ``[images, labels]`` are
            left out. With `steps` they are gone through as often as it takes, so a generator does not do.
        steps: Steps of distillation, one batch each.
        seed: Of the random numbers that `batches` draws (shuffling, augmentation).
        held_back: Batches to judge by, a few; by default every fifth of `batches`, up to four, by their place in it.
        mixed_precision: Distill in bfloat16 where it is safe (`torch.autocast`); by default on CUDA.
        made_up: Distill on made-up inputs, too, where images are gone through more than four times: for photos, which
            they resemble.

    Raises:
        InvalidOption: `steps` is no count, `batches` are none, or a generator is to be gone through several times.
        PlanMismatch: The networks do not belong together.
        CalibrationFailed: There are too few images, they are none that the network takes, or no outputs to compare.
        UnsupportedModel: A network cannot be copied, or has no data.
    """
    result = calibration(
        converted,
        original,
        batches,
        steps=steps,
        seed=seed,
        held_back=held_back,
        mixed_precision=mixed_precision,
        made_up=made_up,
    )
    if result.kept == "converted":
        warnings.warn(f"calibration did not help and nothing was changed; {result}", stacklevel=2)
    elif result.interrupted:
        warnings.warn(str(result), stacklevel=2)
    return converted


@own_settings()
def calibration(
    converted: nn.Module,
    original: nn.Module,
    batches: Iterable[Any],
    *,
    steps: int = 0,
    seed: int = 0,
    held_back: Iterable[Any] | None = None,
    mixed_precision: bool | None = None,
    made_up: bool = False,
    seen: Iterable[Any] | None = None,
) -> Calibration:
    """Calibrate like `calibrate` and return what was measured.

    With `seen`, scales and affine values are told by these batches, and `batches` are for distillation alone.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise InvalidOption(f"steps={steps!r} must be a whole number and not negative")
    must_be_batches(batches)
    if steps and isinstance(batches, Iterator):
        raise InvalidOption("steps= goes through the batches many times; pass a list or a DataLoader, no generator")
    plan = plan_of(converted)
    must_fit(Network(unwrap(original)), plan)
    for model in (converted, original):
        must_have_data(unwrap(model))
    student, teacher = _working_copy(unwrap(converted)), _working_copy(unwrap(original))
    like = next(student.model.parameters())
    with undisturbed(unwrap(converted)), undisturbed(unwrap(original)), torch.random.fork_rng():
        torch.manual_seed(seed)
        images = Split(Prepared(batches, like), None if held_back is None else Prepared(held_back, like))
        judge = _Judge(teacher, images.judged)
        best = {"converted": student}
        scores = {"converted": judge(student)}
        few = first_batches(images.once() if seen is None else Prepared(seen, like))
        if few and _as_converted(unwrap(converted), unwrap(original), plan):
            best["equalized"] = _equalized(teacher, plan, few)
            scores["equalized"] = judge(best["equalized"])
        else:
            best["matched"] = Network(copy_model(student.model))
            match_moments(best["matched"], teacher, alignable(plan), few)
            scores["matched"] = judge(best["matched"])
        interrupted = False
        if steps:
            start = best[min(scores, key=scores.__getitem__)]
            best["distilled"], scores["distilled"], interrupted = _distilled(
                start, teacher, images, judge, steps=steps, seed=seed, mixed_precision=mixed_precision, made_up=made_up
            )
    kept = min(scores, key=scores.__getitem__)
    if kept != "converted":
        _become(unwrap(converted), best[kept].model)
    return Calibration(scores, kept, interrupted)


def _as_converted(converted: nn.Module, original: nn.Module, plan: Plan) -> bool:
    """Tell whether a network's filters are still those that its plan makes of the original's, free to be scaled anew.

    The norms' affine values may differ: images set them.
    """
    fitted = any(entry.affine is Affine.MATCH for entry in plan.norms)
    if not (fitted and plan.options.equalize and plan.options.affine is Affine.MATCH):
        return False
    affine = {f"{name}.{key}" for name in alignable(plan) for key in ("weight", "bias")}
    ours, fresh = converted.state_dict(), apply(original, plan).state_dict()
    return ours.keys() == fresh.keys() and all(
        torch.equal(value, fresh[key].to(value.device))
        for key, value in ours.items()
        if key not in affine and isinstance(value, Tensor)  # not what get_extra_state returns
    )


def _equalized(teacher: Network, plan: Plan, few: list[Any]) -> Network:
    """Convert the original anew, with scales, signs and affine values that images tell."""
    example = few[0] if plan.inputs is None else rebuild(plan.inputs)
    again = convert(teacher.model, example_input=example, batches=few, check=False, **plan.options.wishes())
    carry_plan(again, replace(plan_of(again), inputs=plan.inputs))
    return Network(in_mode(again, False))


def _distilled(
    start: Network,
    teacher: Network,
    images: Split,
    judge: "_Judge",
    *,
    steps: int,
    seed: int,
    mixed_precision: bool | None,
    made_up: bool,
) -> tuple[Network, float, bool]:
    """Distill at the rate that a few steps show to be best; return the network, its score, and if it was cut short."""
    device = next(teacher.model.parameters()).device.type
    mixed = device == "cuda" if mixed_precision is None else mixed_precision
    precision = torch.autocast(device, torch.bfloat16, enabled=mixed)
    supply = images.forever()
    if made_up and images.passes(steps) > PASSES:
        supply = with_made_up(supply, seed=seed)
    batches = iter(tqdm(islice(supply, steps), "distilling", steps, unit="step", disable=None, leave=False))
    names = alignable(plan_of(start.model))

    interrupted = False

    def trained(steps: int, rate: float) -> Network:
        nonlocal interrupted
        student = Network(copy_model(start.model))
        try:
            distill(student, teacher, names, batches, steps=steps, rate=rate, seed=seed, precision=precision)
        except KeyboardInterrupt:
            interrupted = True
        return student

    trial, found = steps // TRIALS, dict[float, tuple[float, Network]]()
    for rate in LEARNING_RATES if trial else ():
        student = trained(trial, rate)
        found[rate] = judge(student), student
        if interrupted:
            break
    best = min(found, key=lambda rate: found[rate][0]) if found else LEARNING_RATES[1]
    if not interrupted:
        student = trained(steps - trial * len(found), best)
        found[0.0] = judge(student), student
    score, student = min(found.values(), key=lambda pair: pair[0])
    return student, score, interrupted


def _working_copy(model: nn.Module) -> Network:
    """Copy a network in eval mode; half precision becomes float32, in which small steps are not lost."""
    copy = in_mode(copy_model(model), False)
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in copy.parameters())
    return Network(copy.float() if half else copy)


@torch.no_grad()
def _become(model: nn.Module, better: nn.Module) -> None:
    """Give a network the values, the group counts and the plan of another that was made from the same original."""
    state, modules = better.state_dict(), Network(better).slots
    for key, value in model.state_dict().items():
        if isinstance(value, Tensor):
            value.copy_(state[key])
    for name, module in Network(model).slots.items():
        if isinstance(module, nn.GroupNorm):
            other: Any = modules[name]
            module.num_groups, module.eps = other.num_groups, other.eps
    carry_plan(model, plan_of(better))


def _seen_by(network: Network, batch: Any) -> Any:
    """Return what a network makes of images."""
    try:
        return call(network.model, fresh(batch))
    except Exception as error:  # whatever the network's own code does with them
        raise CalibrationFailed(
            f"no forward pass ran on the images ({described(error)}); pass batches as the network takes them"
        ) from error


class _Judge:
    """Mean disagreement of outputs with the original's on batches that nothing is learned from."""

    def __init__(self, teacher: Network, batches: list[Any]) -> None:
        self.teacher, self.batches = teacher, batches

    @torch.no_grad()
    def __call__(self, student: Network) -> float:
        """Return the score of a network; of its norms' outputs where the network's cannot be compared."""
        names, scores = alignable(plan_of(student.model)), list[Tensor | None]()
        watched = ({name: network.slots[name] for name in names} for network in (student, self.teacher))
        with outputs_of(next(watched)) as ours, outputs_of(next(watched)) as theirs:
            for batch in self.batches:
                score = disagreement(_seen_by(student, batch), _seen_by(self.teacher, batch))
                scores.append(disagreement(ours, theirs) if score is None else score)
        found = [score for score in scores if score is not None]
        if not found:
            raise CalibrationFailed("the networks' outputs cannot be compared: no tensors of floats alike in shape")
        mean = float(summed(torch.stack(found).mean().double())) / processes()
        return mean if math.isfinite(mean) else math.inf
