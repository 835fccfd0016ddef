"""Check by numbers: run a converted network on random tensors and compare what must be equal."""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from normswap.conversion.checks import Check
from normswap.errors import described, first_line
from normswap.networks.copying import copy_model, in_mode
from normswap.networks.inputs import as_call, batch_size, materialize, tensors_in, vary
from normswap.networks.surroundings import undisturbed
from normswap.networks.validation import unwrap
from normswap.planning.entry import ConvEntry, NormEntry
from normswap.planning.plan import Plan

TOLERANCE = 1e-4
"""Largest difference allowed, relative to the largest output: float32 sums in another order stay far below it."""


def behaviour_checks(converted: nn.Module, plan: Plan, original: nn.Module | None, example: Any) -> list[Check]:
    """Run the network on real tensors; modes and gradients of the user's models are left alone.

    Args:
        converted: The converted network.
        plan: What it was converted by.
        original: The network before conversion, whose gradients are compared where it is given.
        example: An input, or its shapes and types on the meta device.
    """
    with undisturbed(converted), undisturbed(converted if original is None else original):
        return list(_behaviour(converted, plan, original, example))


def _behaviour(converted: nn.Module, plan: Plan, original: nn.Module | None, example: Any) -> Iterator[Check]:
    model = in_mode(copy_model(converted), False)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type == "meta":
        yield Check("numbers", None, "the network is on the meta device")
        return
    inputs, output, failure = _first_run(model, example, device)
    if failure is not None:
        guessed = any(tensor.is_meta and not tensor.is_floating_point() for tensor in tensors_in(example))
        advice = "; its whole numbers are made up, pass example_input=" if guessed else ""
        yield Check("runs", None if guessed else False, f"{described(failure)}{advice}")
        return
    finite = all(bool(torch.isfinite(t).all()) for t in _floats(output))
    yield Check("finite", finite, "outputs are finite" if finite else "outputs hold NaN or infinity")
    yield _batch_one(model, inputs)
    yield _batch_independent(model, inputs, output)
    yield _train_equals_eval(model, inputs, output)
    yield _gradients(converted, plan, original, inputs)


def _first_run(model: nn.Module, example: Any, device: torch.device) -> tuple[Any, Any, Exception | None]:
    """Return inputs that a network runs on, and its output; else the first error."""
    made = partial(materialize, example, device, _dtype(model), seed=0)
    makers: list[Callable[[], Any]] = [made, partial(made, count=1)]
    if not any(tensor.is_meta for tensor in tensors_in(example)):
        makers.append(lambda: tree_map_only(Tensor, lambda tensor: tensor.to(device), example))
    failures = []
    for make in makers:
        try:
            inputs = make()
            return inputs, _output(model, inputs), None
        except Exception as error:  # whatever the network's own code does with them
            failures.append(error)
    return None, None, failures[0]


def _output(model: nn.Module, inputs: Any) -> Any:
    args, kwargs = as_call(copy.deepcopy(inputs))
    with torch.no_grad():
        return model(*args, **kwargs)


def _batch_one(model: nn.Module, inputs: Any) -> Check:
    batch = batch_size(inputs)
    single = _first_sample(inputs, batch)
    try:
        output = _output(model, single)
    except Exception as error:
        return Check("batch size 1", False, described(error))
    finite = all(bool(torch.isfinite(t).all()) for t in _floats(output))
    return Check("batch size 1", finite, "eval runs" if finite else "outputs hold NaN or infinity")


def _batch_independent(model: nn.Module, inputs: Any, output: Any) -> Check:
    name, batch = "batch independence", batch_size(inputs)
    if batch < 2:
        return Check(name, None, "the example holds one sample")
    varied = _output(model, vary(inputs, batch, seed=1))
    pairs = [
        (a[0], b[0]) for a, b in zip(_floats(output), _floats(varied), strict=False) if a.ndim and a.shape[0] == batch
    ]
    if isinstance(output, (list, tuple)) and len(output) == batch and not pairs:
        pairs = list(zip(_floats(output[0]), _floats(varied[0]), strict=False))
        pairs = [(a, b) for a, b in pairs if a.shape == b.shape]
    if not pairs:
        return Check(name, None, "no output has one row per sample")
    worst = max(_difference(a, b) for a, b in pairs)
    return Check(name, worst <= TOLERANCE, f"changing the other samples moves a sample by {worst:.1e}")


def _train_equals_eval(model: nn.Module, inputs: Any, output: Any) -> Check:
    """Compare modes; where a network is random or returns something else in train mode, layer by layer."""
    name, trained = "train() equals eval()", in_mode(copy_model(model), True)
    try:
        state, first = _random_state(), _output(trained, inputs)
        drew = state != _random_state()  # two passes can look alike where little is dropped at random
        comparable = not drew and _worst(first, _output(trained, inputs)) == 0 and _same_structure(first, output)
    except Exception:  # detection networks ask for targets in train mode
        comparable = False
    how = "whole network"
    if not comparable:
        how = "every layer with parameters; the network itself differs by mode"
        trained = copy_model(model)  # the passes above may have moved what a layer keeps, as spectral_norm does
        for module in trained.modules():
            if not any(True for _ in module.children()) and any(True for _ in module.parameters()):
                module.train()
            if isinstance(module, nn.GroupNorm):
                module.training = True
        first = _output(trained, inputs)
    worst = _worst(first, output)
    return Check(name, worst <= TOLERANCE, f"largest difference {worst:.1e} ({how})")


def _random_state() -> bytes:
    states = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else ())]
    return b"".join(state.numpy().tobytes() for state in states)


def _gradients(model: nn.Module, plan: Plan, original: nn.Module | None, inputs: Any) -> Check:
    name = "gradients"
    wanted = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    if not wanted:
        return Check(name, None, "no parameter wants a gradient")
    try:
        reached, finite = _reached(model, inputs)
        before = wanted if original is None else _reached(unwrap(original), inputs)[0]
    except RuntimeError as error:
        return Check(name, None, f"no backward pass ran ({first_line(error)})")
    lost = sorted((before & wanted) - reached)
    if original is None:
        ran = {f"{e.name}.{k}".lstrip(".") for e in plan.changes for k in ("weight", "bias") if _ran(e)}
        lost = [key for key in lost if key in ran]
    if lost:
        return Check(name, False, f"{len(lost)} parameters lost theirs: {', '.join(lost[:3])}")
    if not finite:
        return Check(name, False, "gradients hold NaN or infinity")
    return Check(name, True, f"reach {len(reached)} of {len(wanted)} parameters, as before")


def _ran(entry: NormEntry | ConvEntry) -> bool:
    return bool(entry.feeds) if isinstance(entry, ConvEntry) else entry.shape is not None


def _reached(model: nn.Module, inputs: Any) -> tuple[set[str], bool]:
    """Return the names of the parameters that a gradient reaches in eval mode, and whether all gradients are finite."""
    model = in_mode(
        in_mode(copy_model(model), True), False
    )  # by way of train mode: some networks then drop what they cached
    args, kwargs = as_call(copy.deepcopy(inputs))
    with torch.enable_grad():
        outputs = [t for t in _floats(model(*args, **kwargs)) if t.requires_grad]
        if not outputs:
            raise RuntimeError("the output does not depend on any parameter")
        torch.autograd.backward([t.float().square().mean() for t in outputs])
    grads = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    return set(grads), all(bool(torch.isfinite(grad).all()) for grad in grads.values())


def _first_sample(inputs: Any, batch: int) -> Any:
    if isinstance(inputs, tuple):
        return tuple(_first_sample(item, batch) for item in inputs)
    if isinstance(inputs, list):
        return inputs[:1]
    return tree_map_only(Tensor, lambda t: t[:1] if t.ndim and t.shape[0] == batch else t, inputs)


def _floats(value: Any) -> list[Tensor]:
    return [tensor for tensor in tensors_in(value) if tensor.is_floating_point()]


def _same_structure(a: Any, b: Any) -> bool:
    return [t.shape for t in tensors_in(a)] == [t.shape for t in tensors_in(b)]


def _worst(a: Any, b: Any) -> float:
    if not _same_structure(a, b):
        return float("inf")
    return max((_difference(x, y) for x, y in zip(_floats(a), _floats(b), strict=True)), default=0.0)


def _difference(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest value; NaN counts as infinite."""
    if a.numel() == 0:
        return 0.0
    scale = a.abs().max().double().clamp_min(1e-12)
    return float(torch.nan_to_num((a.double() - b.double()).abs().max() / scale, nan=float("inf")))


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
