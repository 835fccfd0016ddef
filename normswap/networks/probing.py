"""Show by numbers what a norm computes: a copy of it runs on a few random values, in both modes."""

import functools
from collections.abc import Collection, Hashable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from normswap.errors import described
from normswap.layers.norms import OWN
from normswap.networks.copying import PLAIN, copy_model, copy_with, in_mode
from normswap.networks.randomness import RandomState, same_randomness, uniform
from normswap.networks.recognition import NormParts, is_registered_norm, norm_parts

EXACT = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
"""Classes whose forward is torch's own."""

TOLERANCE = 1e-4
"""Largest difference allowed, relative to what is added up; float32 stays below 1e-5."""

LATER = 10**6
"""Batches that a norm is told to have seen: what it does after a warm-up counts too."""

RANKS = (4, 3, 2, 5)
"""Axes that the input of a norm may have that no forward pass reached, in the order they are tried."""

WIDE = 256
"""Channels from which few positions do."""

MANY = 264
"""Samples of a batch that a norm might take apart."""

LARGE = (21, 19, 3)
"""Sides of an input that a norm might treat as a large one."""

GRADIENTS = 1e-3
"""Largest difference allowed between gradients, relative to the largest."""

FRAMEWORK = frozenset(vars(nn.Module()))
"""Attributes that torch gives every module; none decides what it computes, modes aside."""

STATISTICS = ("running_mean", "running_var")
"""Buffers that a pass changes as BatchNorm does."""

FAILS = "it does not run by itself"

BY_BATCH = "it normalizes by the batch's statistics in eval mode, too, which NormParts without mean and var describe"
"""What is said of a norm that keeps running statistics and never uses them."""


def is_stepped(norm: nn.Module, shape: tuple[int, ...]) -> bool:
    """Tell whether a norm's input is (T, N, C, *): all steps of all samples, as spiking networks run them at once.

    torch's own norms take none, though a pass without data lets it through.
    """
    channels = norm_parts(norm).num_channels
    return not _is_exact(norm) and len(shape) > 3 and shape[1] != channels and shape[2] == channels


def as_samples(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape (T·N, C, *) of (T, N, C, *)."""
    return (shape[0] * shape[1], *shape[2:])


def _is_exact(norm: nn.Module) -> bool:
    return type(norm) in EXACT and "forward" not in vars(norm)


def departure(
    norm: nn.Module, then: Sequence[str], shape: tuple[int, ...] | None, known: dict[Hashable, str] | None = None
) -> str:
    """Return how a norm departs from BatchNorm followed by some of its children; empty where it does not.

    In eval mode its output must be BatchNorm's with its parts; in train mode that with the batch's statistics, or again
    with the running ones as frozen norms use them. Of classes that the user taught the eval mode alone is looked at:
    what they do besides in training was the user's decision.

    Args:
        norm: The norm, which is only read; its hooks are left out, as they stay on what replaces it.
        then: Its children that run after the normalization, in order.
        shape: An input that it met, (N, C, *) or (T, N, C, *); None where no forward pass reached it.
        known: What was found before; norms of one class and configuration run once.
    """
    parts = norm_parts(norm)
    if _is_exact(norm):
        return ""
    stepped = shape is not None and is_stepped(norm, shape)
    if shape is not None and stepped:
        shape = as_samples(shape)
    elif shape is not None and (len(shape) < 2 or shape[1] != parts.num_channels):
        return (
            f"its input {shape} does not have its {parts.num_channels} channels on axis 1, where GroupNorm takes them: "
            "turn the axes in the forward that calls it"
        )
    if _runs_elsewhere(norm):
        return "its forward was replaced by a function that no copy of it can run; make that a class of its own"
    known = {} if known is None else known
    key = _configuration(norm, tuple(then), None if shape is None else len(shape))
    if key is None:
        return _departure(norm, then, shape, stepped)
    if (key, stepped) not in known:
        known[key, stepped] = _departure(norm, then, shape, stepped)
    return known[key, stepped]


def _runs_elsewhere(norm: nn.Module) -> bool:
    """Tell whether a forward was put on the module itself that is not bound to it: it may run the original's."""
    forward = vars(norm).get("forward")
    bound = forward.args if isinstance(forward, functools.partial) else (getattr(forward, "__self__", None),)
    return forward is not None and all(value is not norm for value in bound)


def _configuration(norm: nn.Module, then: tuple[str, ...], axes: int | None) -> Hashable:
    """Return all that decides what a norm does with its own tensors; None where others decide, too."""
    key: list[Hashable] = [then, axes, is_registered_norm(norm)]
    for module in norm.modules():
        tensors = {**module._parameters, **module._buffers}
        if any(tensor is not None and (module is not norm or name not in OWN) for name, tensor in tensors.items()):
            return None
        key += [
            id(type(module)),
            tuple((name, None if t is None else (t.shape, t.dtype)) for name, t in tensors.items()),
        ]
        for name, value in vars(module).items():
            if name not in FRAMEWORK:
                key.append((name, value if type(value) in PLAIN else id(value)))
    return tuple(key)


def _departure(norm: nn.Module, then: Sequence[str], shape: tuple[int, ...] | None, stepped: bool) -> str:
    taught = is_registered_norm(norm)
    compared = functools.partial(_compared, stepped=stepped)
    with torch.no_grad(), same_randomness(_device(norm)):
        twin, found, x = _twin(norm), FAILS, torch.empty(0)
        for size in _sizes(norm_parts(twin).num_channels, shape):
            x = _values(norm_parts(twin), size)
            found = compared(twin, then, x, training=False)
            if not found.startswith(FAILS):
                break
        if taught or found:
            return "" if taught and found.startswith(FAILS) else found
        modes = (False,) if _would_communicate(norm) else (False, True)
        before = _counters(twin)
        found = compared(twin, then, x, training=True) if True in modes else ""
        if not found and (counted := _counters(twin).items() - before.items()):
            _count(twin, [place for place, _ in counted])
            found = compared(twin, then, x, training=True)
        if found:
            return found
        others = [_values(norm_parts(twin), size) for size in _other_sizes(tuple(x.shape))]
        for training in modes:
            for own in (x, *others):
                found = compared(twin, then, own, training=training, attached=own is x)
                if found and not found.startswith(FAILS):
                    return found if own is x else f"{found} on an input {tuple(own.shape)}"
        return ""


def _device(norm: nn.Module) -> torch.device:
    """Return where a norm can be run."""
    parts = norm_parts(norm)
    tensor = next((t for t in (parts.weight, parts.mean, *norm.parameters()) if t is not None), None)
    return torch.device("cpu") if tensor is None or tensor.is_meta else tensor.device


def _twin(norm: nn.Module) -> nn.Module:
    """Return a copy without hooks, with random values in all that the norm and its children hold: none must decide."""
    device, generator = _device(norm), torch.Generator().manual_seed(0)

    def real(tensor: Tensor) -> Tensor:
        value = torch.zeros(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else tensor.detach().clone()
        return value.to(device, torch.float32 if tensor.is_floating_point() and tensor.itemsize < 4 else tensor.dtype)

    twin = copy_with(norm, real)
    for module in twin.modules():
        for name, value in vars(module).items():
            if name.endswith("_hooks") and name in FRAMEWORK:
                value.clear()
    parts = norm_parts(twin)
    for tensor in (*twin.parameters(), *twin.buffers()):
        if tensor.is_floating_point():
            draw = uniform(tensor.shape, generator)
            if tensor is parts.weight:
                draw = (18 * draw - 9).pow(3) / 81  # of both signs, mostly small
            elif tensor is parts.var:
                draw = 10 * draw.pow(4) + 1e-3
                draw[1::3] *= parts.eps  # epsilon shows where little is added to it
            elif tensor is parts.bias or tensor is parts.mean:
                draw = 6 * draw - 3
                if tensor is parts.mean:
                    draw[1::3] *= parts.eps**0.5  # float32 holds no small deviation from a large mean
            else:
                draw = draw + 0.5
            tensor.copy_(draw)
    return twin


def _sizes(channels: int, shape: tuple[int, ...] | None) -> Iterator[tuple[int, ...]]:
    """Yield sizes of inputs, small ones first, in which no other axis looks like the channels."""
    batch, sides = 4 if channels != 4 else 6, [n for n in (3, 5, 2, 7, 1) if n != channels]
    for axes in RANKS if shape is None else (len(shape),):
        sizes = sorted(sides[: axes - 2]) if channels > WIDE else sides[: axes - 2]
        yield (batch if axes > 2 else 4 * batch, channels, *sizes)
    if shape is not None:
        yield (batch, *shape[1:])


def _other_sizes(size: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Yield sizes of inputs on which a norm may do something else: one sample, many, a large map."""
    _, channels, *sides = size
    yield (1, channels, *sides)
    if sides:
        yield (MANY, channels, *(1 for _ in sides))
        if channels <= WIDE:
            yield (2, channels, *LARGE[: len(sides)])
    else:
        yield (MANY, channels)


def _values(parts: NormParts, size: tuple[int, ...]) -> Tensor:
    """Return an input around the running statistics that reaches far beyond them, where bounds would show."""
    like = next((t for t in (parts.mean, parts.weight, parts.bias) if t is not None), torch.empty(0))
    generator = torch.Generator().manual_seed(1)
    x = uniform(size, generator).sub_(0.5).mul_(8).pow_(5).to(like.device, like.dtype)  # up to a thousand
    axes = (1, -1, *(1 for _ in size[2:]))
    return x if parts.mean is None or parts.var is None else x * parts.var.sqrt().view(axes) + parts.mean.view(axes)


def _compared(
    twin: nn.Module, then: Sequence[str], x: Tensor, *, training: bool, stepped: bool, attached: bool = False
) -> str:
    """Return how the output of a twin departs from BatchNorm's in one mode; attached, how its gradient does, too."""
    mode, device = "train" if training else "eval", x.device
    parts = norm_parts(in_mode(twin, training))
    running = None if parts.mean is None or parts.var is None else (parts.mean.clone(), parts.var.clone())
    weight, bias = (None if own is None else own.detach().clone() for own in (parts.weight, parts.bias))
    held = replace(parts, weight=weight, bias=bias)  # the pass may write to the norm's own
    state = RandomState.now(device)
    x = x.detach().requires_grad_(attached)
    try:
        with torch.set_grad_enabled(attached):
            given = x.clone()
            output = _in_steps(twin, given) if stepped else twin(given)
    except Exception as error:  # whatever the user's own code does
        return f"{FAILS} on {tuple(x.shape)} in {mode} mode ({described(error)})"
    drawn = RandomState.now(device)
    if not isinstance(output, Tensor) or output.shape != x.shape:
        what = f"a tensor {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
        return f"in {mode} mode it returns {what} for an input {tuple(x.shape)}"
    if not torch.equal(given, x):
        return f"in {mode} mode it writes to its input, which may be read once more; have it return a new tensor"
    found, drew = "", not drawn.equals(state)
    tried = (None, running) if training else (running, None)
    for statistics in tried if running else (None,):
        if drew:
            state.restore()
        with torch.set_grad_enabled(attached):
            expected, bound = _batch_norm(held, x, statistics)
            try:
                for module in _modules_after(twin, parts, then, training=training):
                    expected = module(expected)
            except Exception:  # its children run on something else
                return f"in {mode} mode its output is not what its children make of BatchNorm's"
        if not isinstance(expected, Tensor) or expected.shape != output.shape:
            return f"in {mode} mode its output is not what its children make of BatchNorm's"
        if drew and not RandomState.now(device).equals(drawn):
            return f"in {mode} mode its forward draws random numbers, which GroupNorm does not"
        off = _difference(output.detach(), expected.detach(), bound)
        if not off and not (off := _gradients_apart(output, expected, x, parts) if attached else ""):
            return BY_BATCH if running and statistics is None and not training else ""
        if statistics is running:
            found = off if off.startswith("gradient") else f"output is {off}"
    return f"in {mode} mode its {found} off BatchNorm's"


def _in_steps(twin: nn.Module, x: Tensor) -> Any:
    """Return what a norm of (T, N, C, *) values makes of (T·N, C, *), in two steps where they are that many."""
    output: Tensor = twin(x.unflatten(0, (2 - len(x) % 2, -1)))
    return output.flatten(0, 1)


def _batch_norm(parts: NormParts, x: Tensor, running: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Return what BatchNorm makes of an input, and the size of what it adds up; by the batch where nothing is given."""
    axes = (1, -1, *(1 for _ in x.shape[2:]))
    if running is None:
        rows = x.movedim(1, -1).reshape(-1, x.shape[1])
        mean = rows.mean(0)
        var = (rows - mean).square().mean(0)  # a tenth of the time that var_mean takes for so few rows
    else:
        mean, var = (value.to(x) for value in running)
    weight, bias = parts.affine(x)
    scale = weight / (var + parts.eps).sqrt()
    scale, mean, bias = (value.view(axes) for value in (scale, mean, bias))
    shift = bias - mean * scale
    scaled = x * scale
    return scaled + shift, scaled.detach().abs() + (mean * scale).detach().abs() + bias.abs()


def _modules_after(twin: nn.Module, parts: NormParts, then: Sequence[str], *, training: bool) -> Iterator[nn.Module]:
    """Yield what runs after the normalization: the twin's children, or what the user named, of which copies run."""
    own = {id(module) for module in twin.modules()}
    for module in [getattr(twin, name) for name in then] if parts.then is None else parts.then.values():
        yield module if id(module) in own else in_mode(copy_model(module), training)


def _difference(output: Tensor, expected: Tensor, bound: Tensor) -> str:
    """Return how far an output is off, in percent; nothing where that is rounding."""
    off, size = (output - expected).abs(), expected.abs()
    same = off <= bound.add_(size).mul_(TOLERANCE)
    if bool(same.all()):
        return ""
    same |= (output == expected) | (output.isnan() & expected.isnan())  # an activation may overflow in both
    if bool(same.all()):
        return ""
    share = float(off[~same].norm() / size.norm().clamp_min(1e-12))
    return f"{share:.1%}" if share > 5e-4 else "less than 0.1%"


def _gradients_apart(output: Tensor, expected: Tensor, x: Tensor, parts: NormParts) -> str:
    """Return which gradient is off where outputs agree: the input's, or an affine value's that none reaches.

    Nothing where one cannot be had.
    """
    upstream = uniform(output.shape, torch.Generator().manual_seed(2)).to(output) - 0.5
    trained = [own for own in (parts.weight, parts.bias) if isinstance(own, nn.Parameter) and own.requires_grad]
    try:
        (ours, *reached), (theirs,) = (
            torch.autograd.grad(values, inputs, upstream, allow_unused=True) if values.requires_grad else [None]
            for values, inputs in ((output, [x, *trained]), (expected, [x]))
        )
    except Exception:  # it cannot be trained, as it is
        return ""
    if theirs is None:
        return ""
    if any(gradient is None for gradient in reached):
        return "gradient for its affine part is"
    ours = torch.zeros_like(theirs) if ours is None else ours
    axes = [axis for axis in range(x.ndim) if axis != 1]
    off, size = ((values.abs().amax(axes)) for values in (ours - theirs, theirs))
    return "" if bool((off <= GRADIENTS * size.amax()).all()) else "gradient is"


def _counters(twin: nn.Module) -> dict[tuple[str, Any], float]:
    """Return the single numbers that a norm keeps, by name and key: those that a pass changes count batches."""
    found: dict[tuple[str, Any], float] = {}
    for name, value in vars(twin).items():
        if type(value) in (int, float):
            found[name, None] = value
        elif type(value) in (dict, list) and name not in FRAMEWORK:
            items = value.items() if isinstance(value, dict) else enumerate(value)
            found |= {(name, key): one for key, one in items if type(one) in (int, float)}
    single = {name: buffer for name, buffer in twin._buffers.items() if buffer is not None and buffer.numel() == 1}
    return found | {(name, None): float(buffer) for name, buffer in single.items() if name not in STATISTICS}


def _count(twin: nn.Module, counters: Collection[tuple[str, Any]]) -> None:
    """Have a norm believe that it has seen many batches."""
    for name, key in counters:
        buffer = twin._buffers.get(name)
        if buffer is not None:
            buffer.fill_(LATER)
        elif key is None:
            vars(twin)[name] = LATER
        else:
            vars(twin)[name][key] = LATER


def _would_communicate(norm: nn.Module) -> bool:
    """Tell whether a norm would wait for other processes in train mode."""
    communicates = torch.distributed.is_available() and torch.distributed.is_initialized()
    return communicates and isinstance(norm, nn.SyncBatchNorm)
