"""Check by numbers: run a converted network on random tensors and compare what must be equal."""

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils._pytree import tree_map_only

from normswap.conversion.checks import Check
from normswap.errors import described, first_line
from normswap.layers.recomputing import recomputing
from normswap.networks.copying import copy_model, in_mode
from normswap.networks.inputs import (
    Samples,
    as_call,
    cannot_be_seen,
    first_sample,
    has_other_axes,
    leaves_in,
    materialize,
    may_name_samples,
    tensors_in,
    vary,
)
from normswap.networks.randomness import RandomState, seed_all, uniform
from normswap.networks.sharing import sparing
from normswap.networks.surroundings import undisturbed
from normswap.networks.validation import unwrap
from normswap.planning.entry import ConvEntry, NormEntry
from normswap.planning.plan import Plan
from normswap.tracing.modes import blocks_branch_on_mode

TOLERANCE = 1e-4
"""Largest difference allowed, relative to the largest output: float32 sums in another order stay far below it."""

CLOSED = 1e-3
"""A parameter without a larger value hides what is behind it: a gate, the last norm of a branch that starts at zero."""


def behaviour_checks(
    converted: nn.Module,
    plan: Plan,
    original: nn.Module | None,
    example: Any,
    samples: Samples,
    *,
    stopped: bool = False,
) -> list[Check]:
    """Run the network on real tensors; modes and gradients of the user's models are left alone.

    Args:
        converted: The converted network.
        plan: What it was converted by.
        original: The network before conversion, with which training is compared where it is given.
        example: An input, or its shapes and types on the meta device.
        samples: How that input holds its samples.
        stopped: Whether a pass stops on such shapes after the last norm, before conversion as after it.
    """
    with undisturbed(converted), undisturbed(converted if original is None else original):
        return sparing(lambda: list(_behaviour(converted, plan, original, example, samples, stopped)))


def _behaviour(
    converted: nn.Module, plan: Plan, original: nn.Module | None, example: Any, samples: Samples, stopped: bool
) -> Iterator[Check]:
    model = in_mode(copy_model(converted), False)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type == "meta":
        yield Check("numbers", None, "the network is on the meta device")
        return
    inputs, output, failure = _first_inputs(model, example, device)
    if failure is not None:
        unknown = [tensor for tensor in tensors_in(example) if tensor.is_meta]
        guessed = stopped and bool(unknown)
        advice = "; the input is made up, pass example_input=" if guessed else ""
        if any(not tensor.is_floating_point() for tensor in unknown):
            guessed, advice = True, "; its whole numbers are made up, pass example_input="
        yield Check("runs", None if guessed else False, f"{described(failure)}{advice}")
        return
    original = None if original is None else unwrap(original)
    yield _finite(output)
    yield _batch_one(model, original, inputs, samples)
    opened, output = _opened(model, inputs, output)
    yield _batch_independent(opened, original, inputs, output, samples)
    yield _train_equals_eval(opened, plan, inputs, output, samples)
    yield _gradients(converted, plan, original, inputs)


def _first_inputs(model: nn.Module, example: Any, device: torch.device) -> tuple[Any, Any, Exception | None]:
    """Return inputs that a network runs on and its output, a finite one where there is such; else the first error."""
    made = partial(materialize, example, device, _dtype(model), seed=0)
    makers: list[Callable[[], Any]] = [made, partial(made, count=1)]
    if not any(tensor.is_meta for tensor in tensors_in(example)):
        makers.append(lambda: tree_map_only(Tensor, lambda tensor: tensor.to(device), example))
    failures, ran = list[Exception](), list[tuple[Any, Any]]()
    for make in makers:
        try:
            inputs = make()
            output = _output(model, inputs)
        except Exception as error:  # whatever the network's own code does with them
            failures.append(error)
        else:
            if _is_finite(output):
                return inputs, output, None
            ran.append((inputs, output))
    return (*ran[0], None) if ran else (None, None, failures[0])


def _output(model: nn.Module, inputs: Any) -> Any:
    """Return what a network makes of inputs, with the same random numbers every time.

    A copy runs, for some keep what they saw (spiking neurons, caches).
    """
    args, kwargs = as_call(_copied(inputs))
    twin = copy_model(model)
    seed_all(0)
    with torch.no_grad():
        return twin(*args, **kwargs)


def _copied(inputs: Any) -> Any:
    """Return a deep copy; deepcopy itself knows not all layouts."""
    return copy.deepcopy(inputs, {id(tensor): tensor.detach().clone() for tensor in tensors_in(inputs)})


def _finite(output: Any) -> Check:
    unseen = sorted({type(leaf).__name__ for leaf in leaves_in(output) if cannot_be_seen(leaf)})
    held = f"a {unseen[0]}" if unseen else "no numbers"
    if not _floats(output):
        return Check("finite", None, f"the output holds {held}: nothing that could be looked at")
    finite = _is_finite(output)
    also = f"; {held} among them could not be looked at" if unseen else ""
    return Check("finite", finite, f"outputs are finite{also}" if finite else "outputs hold NaN or infinity")


def _is_finite(output: Any) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in _floats(output))


def _batch_one(model: nn.Module, original: nn.Module | None, inputs: Any, samples: Samples) -> Check:
    single = first_sample(inputs, samples)
    try:
        output = _output(model, single)
    except Exception as error:
        why = "indices in the example may name other samples" if may_name_samples(inputs, samples) else ""
        if not why and has_other_axes(inputs, samples):
            why = "a tensor of the example may hold samples on another axis than its first"
        if why and (original is None or not _runs(original, single)):
            return Check("batch size 1", None, f"one sample does not run by itself: {why} ({described(error)})")
        return Check("batch size 1", False, described(error))
    finite = _is_finite(output)
    return Check("batch size 1", finite, "eval runs" if finite else "outputs hold NaN or infinity")


def _runs(model: nn.Module, inputs: Any) -> bool:
    """Tell whether a network runs in eval mode."""
    try:
        _output(in_mode(copy_model(model), False), inputs)
    except Exception:  # whatever its own code does
        return False
    return True


def _opened(model: nn.Module, inputs: Any, output: Any) -> tuple[nn.Module, Any]:
    """Return a copy whose closed gates are open, so that what is behind them shows, and its output; the model and its
    own where there are none, or where that is too much.

    Values of branches that start with zeros are made up; as the same network is compared with itself they may be.
    """
    opened, generator = copy_model(model), torch.Generator().manual_seed(0)
    some = (p for p in opened.parameters() if p.is_floating_point() and p.numel())
    closed = [parameter for parameter in some if float(parameter.detach().abs().max()) < CLOSED]
    for parameter in closed:
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
        parameter.data = torch.empty_like(parameter).copy_((uniform(parameter.shape, generator) + 0.5) / fan_in)
    if not closed:
        return model, output
    try:
        made = _output(opened, inputs)
    except Exception:
        return model, output
    return (opened, made) if _is_finite(made) else (model, output)


def _batch_independent(
    model: nn.Module, original: nn.Module | None, inputs: Any, output: Any, samples: Samples
) -> Check:
    """Change all samples but the first and look at what becomes of the first one.

    What holds a mean over the batch beside other outputs, as the original has it, is left out.
    """
    name = "batch independence"
    if samples.count < 2:
        return Check(name, None, "the example holds one sample")
    moved, paired = _moved(model, inputs, output, samples)
    if not moved:
        return Check(name, None, "no output has one row per sample")
    named, worst, note = may_name_samples(inputs, samples), max(moved), ""
    if worst > TOLERANCE and original is not None:
        twin = in_mode(copy_model(original), False)
        before, _ = _moved(twin, inputs, _output(twin, inputs), samples)
        if (paired or named) and max(before, default=0) > TOLERANCE:
            return Check(name, None, "the network compares its samples with each other, as before")
        alone = [own for own, first in zip(moved, before, strict=False) if first <= TOLERANCE]
        if len(before) == len(moved) and alone:
            worst = max(alone)
            note = f", but for {len(moved) - len(alone)} of {len(moved)} outputs that mix samples as before"
    if named and worst > TOLERANCE and original is None:
        return Check(name, None, "indices in the example may name its samples; pass the original to compare")
    return Check(name, worst <= TOLERANCE, f"changing the other samples moves a sample by {worst:.1e}{note}")


def _moved(model: nn.Module, inputs: Any, output: Any, samples: Samples) -> tuple[list[float], bool]:
    """Return how far the first sample's outputs move when the others change, and whether one is of pairs of samples.

    An output with several axes that run over the samples is one of pairs, of which the first sample's with itself is
    looked at. Outputs without a row per sample are left out.
    """
    count, varied = samples.count, _output(model, vary(inputs, samples, seed=1))
    rows = [(a, b) for a, b in zip(_floats(output), _floats(varied), strict=False) if a.ndim and a.shape[0] == count]
    pairs = [(_first(a, count), _first(b, count)) for a, b in rows if a.shape == b.shape]
    if isinstance(output, (list, tuple)) and len(output) == count and not pairs:
        pairs = list(zip(_floats(output[0]), _floats(varied[0]), strict=False))
        pairs = [(a, b) for a, b in pairs if a.shape == b.shape]
    paired = any(tuple(a.shape).count(count) > 1 for a, _ in rows)
    return [_difference(a, b) for a, b in pairs], paired


def _first(tensor: Tensor, count: int) -> Tensor:
    return tensor[tuple(0 if size == count else slice(None) for size in tensor.shape)]


def _train_equals_eval(model: nn.Module, plan: Plan, inputs: Any, output: Any, samples: Samples) -> Check:
    """Compare modes; where a network is random or returns something else in train mode, layer by layer.

    Norms that the user kept are left in eval mode: their statistics are what was asked for.
    """
    name = "train() equals eval()"
    kept = [entry for entry in plan.norms if entry.by_user and not entry.changes]
    trained = in_mode(copy_model(model), True)
    _leave_kept(trained, kept)
    first: Any = None
    try:
        state, first = _seeded_state(), _output(trained, inputs)
        drew = state != _random_state()  # two passes can look alike where little is dropped at random
        comparable = not drew and _worst(first, _output(trained, inputs)) == 0 and _same_structure(first, output)
    except Exception:  # detection networks ask for targets in train mode
        comparable = False
    how = "whole network"
    if (
        comparable
        and _worst(first, output) > TOLERANCE
        and (blocks_branch_on_mode(model) or _unsteady(trained, inputs))
    ):
        comparable = False  # its own code does something else in train mode
    if not comparable:
        how = "every layer with parameters; the network itself differs by mode"
        how += ", and mixes samples in train mode" if _mixes(trained, inputs, first, samples) else ""
        trained = copy_model(model)  # the passes above may have moved what a layer keeps, as spectral_norm does
        for module in trained.modules():
            if not any(True for _ in module.children()) and any(True for _ in module.parameters()):
                in_mode(module, True)
            if isinstance(module, nn.GroupNorm):
                module.training = True
        _leave_kept(trained, kept)
        for layer in _unsteady(trained, inputs):
            layer.eval()
        first = _output(trained, inputs)
    if kept:
        how += f", without the {len(kept)} norms that were kept"
    if not _floats(output):
        return Check(name, None, "the output holds nothing that could be looked at")
    worst = _worst(first, output)
    return Check(name, worst <= TOLERANCE, f"largest difference {worst:.1e} ({how})")


def _mixes(model: nn.Module, inputs: Any, output: Any, samples: Samples) -> bool:
    """Tell whether the other samples move the first one's outputs; False where the network does not run."""
    if samples.count < 2:
        return False
    try:
        moved, _ = _moved(model, inputs, output, samples)
    except Exception:  # detection networks ask for targets in train mode
        return False
    return max(moved, default=0) > TOLERANCE


def _unsteady(model: nn.Module, inputs: Any) -> list[nn.Module]:
    """Return the layers without children that train mode changes by more than a norm: those that draw random numbers,
    as recurrent ones with dropout do, and those whose hooks move what they keep, as ``nn.utils.spectral_norm`` does, or
    that compute a parameter and move it, as its parametrization does.
    """
    twin, found, before = copy_model(model), set[str](), dict[str, bytes]()
    kept = dict[str, list[Tensor]]()
    lists = [name for name, module in twin.named_modules() if isinstance(module, ParametrizationList)]

    def moved(name: str, module: nn.Module) -> bool:
        return not all(map(torch.equal, kept[name], module.buffers()))

    def entering(name: str, module: nn.Module, _: Any) -> None:
        kept[name] = [buffer.clone() for buffer in module.buffers()]

    def entered(name: str, module: nn.Module, _: Any) -> None:
        if moved(name, module):
            found.add(name)
        before[name] = _random_state()

    def leaving(name: str, module: nn.Module, *_: Any) -> None:
        computed = name.rpartition(".")[0] in lists
        if (computed and moved(name, module)) or before[name] != _random_state():
            found.add(name)

    for name, module in twin.named_modules():
        if module.training and not module._modules:
            module.register_forward_pre_hook(partial(entering, name), prepend=True)
            module.register_forward_pre_hook(partial(entered, name))
            module.register_forward_hook(partial(leaving, name))
    _output(twin, inputs)
    return [module for name, module in model.named_modules() if name in found]


def _leave_kept(model: nn.Module, kept: list[NormEntry]) -> None:
    for entry in kept:
        in_mode(model.get_submodule(entry.name), False)


def _seeded_state() -> bytes:
    seed_all(0)
    return _random_state()


def _random_state() -> bytes:
    now = RandomState.now()
    states = [now.cpu, *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else ())]
    others = str((hash(now.python), now.numpy and now.numpy[2:])).encode()  # numpy's position among its numbers
    return b"".join([*(state.numpy().tobytes() for state in states), others])


@dataclass(frozen=True)
class _Step:
    """What a forward and a backward pass did.

    Attributes:
        reached: Names of the parameters that a gradient reached.
        finite: Whether all gradients are finite.
        error: What ended it, and None where nothing did.
        where: Name of the replaced layer in which it ended; None elsewhere.
    """

    reached: frozenset[str] = frozenset()
    finite: bool = True
    error: Exception | None = None
    where: str | None = None


def _gradients(model: nn.Module, plan: Plan, original: nn.Module | None, inputs: Any) -> Check:
    name = "gradients"
    wanted = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    if not wanted:
        return Check(name, None, "no parameter wants a gradient")
    step, note = _Step(), ""
    for training in (True, False):
        step = _step(model, plan, inputs, training=training)
        before = None if original is None else _step(original, plan, inputs, training=training)
        mode = " in train mode" if training else ""
        if step.error is not None:
            if step.where is not None or (before is not None and before.error is None):
                where = "" if step.where is None else f" in {step.where}, which was replaced"
                return Check(name, False, f"a step{mode} raises {described(step.error)}{where}")
            note = f"; in train mode no pass ran ({first_line(step.error)})" if training else ""
        elif lost := _lost(step, before, plan, wanted, training=training):
            return Check(name, False, f"{len(lost)} parameters lost theirs{mode}: {', '.join(lost[:3])}")
    if step.error is not None:
        return Check(name, None, f"no backward pass ran ({first_line(step.error)})")
    if not step.finite:
        return Check(name, False, "gradients hold NaN or infinity")
    return Check(name, True, f"reach {len(step.reached)} of {len(wanted)} parameters, as before{note}")


def _lost(step: _Step, before: _Step | None, plan: Plan, wanted: set[str], *, training: bool) -> list[str]:
    """Return the parameters that a gradient reached before conversion, or should, and does not any more."""
    if before is None and not training:  # in train mode some networks leave layers out at random
        should = {f"{e.name}.{k}".lstrip(".") for e in plan.changes for k in ("weight", "bias") if _ran(e)}
    else:
        should = set() if before is None or before.error is not None else set(before.reached)
    return sorted((should & wanted) - step.reached)


def _ran(entry: NormEntry | ConvEntry) -> bool:
    return bool(entry.feeds) if isinstance(entry, ConvEntry) else entry.shape is not None


def _step(model: nn.Module, plan: Plan, inputs: Any, *, training: bool) -> _Step:
    """Run a forward and a backward pass on a copy, on which neither kernels nor gradients are kept where that works."""
    step = _passed(model, plan, inputs, training=training, lean=True)
    return step if step.error is None else _passed(model, plan, inputs, training=training, lean=False)


def _passed(model: nn.Module, plan: Plan, inputs: Any, *, training: bool, lean: bool) -> _Step:
    model = in_mode(copy_model(model), True)
    in_mode(model, training)  # by way of train mode: some networks then drop what they cached
    reached, finite, names = set[str](), True, dict[int, str]()

    def look(parameter: Tensor) -> None:
        nonlocal finite
        if (grad := parameter.grad) is not None:
            reached.add(names[id(parameter)])
            finite = finite and bool(torch.isfinite(grad).all())
            parameter.grad = None

    args, kwargs = as_call(_copied(inputs))
    seed_all(0)
    try:
        with torch.enable_grad(), recomputing(model) if lean else nullcontext():
            outputs = [t for t in _floats(model(*args, **kwargs)) if t.requires_grad]
            if not outputs:
                raise RuntimeError("the output does not depend on any parameter")
            for key, parameter in model.named_parameters():
                names[id(parameter)] = key
                if lean and parameter.requires_grad and parameter.is_leaf:
                    parameter.register_post_accumulate_grad_hook(look)
            torch.autograd.backward([t.float().square().mean() for t in outputs])
    except Exception as error:
        return _Step(error=error, where=_replaced_layer(error, model, plan))
    for parameter in model.parameters():
        look(parameter)
    return _Step(frozenset(reached), finite)


def _replaced_layer(error: Exception, model: nn.Module, plan: Plan) -> str | None:
    """Return the replaced layer that an error went through, None where it went through none."""
    modules = dict(model.named_modules())
    layers = {id(modules[entry.name]): entry.name for entry in plan.changes if entry.name in modules}
    place = error.__traceback__
    while place is not None:
        own = place.tb_frame.f_locals.get("self")
        if id(own) in layers and own is not model:
            return layers[id(own)]
        place = place.tb_next
    return None


def _floats(value: Any) -> list[Tensor]:
    """Return the numbers of an output as tensors; arrays and single numbers too."""
    return [
        tensor
        for leaf in leaves_in(value)
        if isinstance(leaf, (Tensor, float, complex))
        or (isinstance(leaf, (np.ndarray, np.generic)) and leaf.dtype.kind in "fc")
        for tensor in _dense(torch.as_tensor(leaf))
        if tensor.is_floating_point() or tensor.is_complex()
    ]


def _dense(tensor: Tensor) -> tuple[Tensor, ...]:
    """Return a tensor as ones that torch's arithmetic takes: a nested one's parts, values of eight bits widened."""
    if tensor.is_nested:
        return tensor.unbind()
    dense = tensor if tensor.layout is torch.strided else tensor.to_dense()
    return (dense.float() if dense.is_floating_point() and dense.itemsize == 1 else dense,)


def _same_structure(a: Any, b: Any) -> bool:
    ours, theirs = ([part.shape for t in tensors_in(value) for part in _dense(t)] for value in (a, b))
    return ours == theirs


def _worst(a: Any, b: Any) -> float:
    ours, theirs = _floats(a), _floats(b)
    if not _same_structure(a, b) or len(ours) != len(theirs):
        return float("inf")
    return max((_difference(x, y) for x, y in zip(ours, theirs, strict=True)), default=0.0)


def _difference(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest value; NaN counts as infinite."""
    if a.numel() == 0:
        return 0.0
    a, b, wide = a.detach(), b.detach(), torch.complex128 if a.is_complex() else torch.float64
    scale = a.abs().max().double().clamp_min(1e-12)
    return float(torch.nan_to_num((a.to(wide) - b.to(wide)).abs().max() / scale, nan=float("inf")))


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
