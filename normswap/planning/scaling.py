"""Show by running that a layer's output scales with its filters, and that norms meet the channels they seem to meet.

Factors are powers of two with a sign, with which sums of floats scale exactly: what differs is no rounding.
"""

from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from normswap.layers.convs import layout_of
from normswap.layers.equalization import times
from normswap.layers.norms import HOOKS
from normswap.networks.copying import PLAIN, copy_model, in_mode
from normswap.networks.hooks import outputs_of
from normswap.networks.inputs import call, first_sample, fresh, materialize, reference, tensors_in
from normswap.networks.network import Network
from normswap.networks.probing import FRAMEWORK
from normswap.networks.randomness import normal, seed_all
from normswap.networks.recognition import rows_of
from normswap.networks.surroundings import undisturbed
from normswap.tracing.facts import Trace

TOLERANCE = 1e-5
"""Largest difference, relative to the largest value."""

NO_NORM = "<network>"
"""What stands for the network's own outputs beside the names of norms."""

SIZES = frozenset("in_channels out_channels in_features out_features".split())
"""Attributes of torch's own layers by which their forward decides nothing."""


def layer_follows(layer: nn.Module, known: dict[Hashable, bool | None] | None = None) -> bool | None:
    """Tell whether the output of a layer is multiplied, channel by channel, by what its filters are.

    A copy of it runs on one small random sample. None where it does not run by itself.

    Args:
        layer: A convolution or a linear layer.
        known: What was found before; layers of one class and configuration run once.
    """
    known = {} if known is None else known
    key = _configuration(layer)
    if key is None:
        return _follows(layer)
    if key not in known:
        known[key] = _follows(layer)
    return known[key]


def _configuration(layer: nn.Module) -> Hashable:
    """Return all that decides what a layer does with its weight and its bias; None where others may decide, too."""
    own, kind = vars(layer), type(layer)
    sizes = SIZES if kind.__module__.startswith("torch.nn.") else frozenset()
    tensors = {name: tensor for key in ("_parameters", "_buffers") for name, tensor in own[key].items()}
    if layer._modules or tensors.keys() - {"weight", "bias"} or any(own.get(name) for name in HOOKS):
        return None
    key: list[Any] = [kind]
    for name, tensor in tensors.items():
        about = None if tensor is None else (type(tensor), tensor.dtype, tensor.device, tensor.layout)
        key.append((name, about if sizes or tensor is None else (about, tensor.shape)))
    for name, value in own.items():
        if name in FRAMEWORK or name in sizes:
            continue
        if type(value) not in PLAIN and not (type(value) is tuple and all(type(item) in PLAIN for item in value)):
            if type(value) is not list or any(type(item) not in PLAIN for item in value):
                return None
            value = tuple(value)
        key.append((name, value))
    return tuple(key)


@torch.no_grad()
def _follows(layer: nn.Module) -> bool | None:
    try:
        x = _sample(layer)
        with undisturbed(layer):
            copy = in_mode(copy_model(layer), False)
            before, factors = copy(x), _factors(rows_of(layer), 0)
            _scale(copy, factors)
            after = copy(x)
        return _close(after, before * _along_channels(factors, before))
    except (Exception, SystemExit):  # whatever the layer's own code does with it
        return None


@torch.no_grad()
def first_astray(network: Network, trace: Trace, places: Mapping[str, Iterable[tuple[str, int, int]]]) -> str | None:
    """Return the first norm that does not undo the factors of filters, by the slices of its channels; None for none.

    Two passes of a copy on one sample of random values: as it is; and with scaled filters, with what norms read divided
    slice by slice. The norms' outputs and the network's must be the same.

    Args:
        network: The unconverted network.
        trace: What a forward pass of it showed.
        places: Layer, first channel and end of every slice of a norm that is to be scaled, by norm in their order.

    Returns:
        The norm's name; NO_NORM where the network does not run, or all norms do and something else moves.
    """
    layers = dict.fromkeys(layer for own in places.values() for layer, _, _ in own)
    factors = {layer: _factors(rows_of(network.slots[layer]), seed) for seed, layer in enumerate(layers)}
    with undisturbed(network.model), torch.compiler.set_stance("force_eager"):
        try:
            copy = Network(in_mode(copy_model(network.model), False))
            like = reference(copy.model)
            example = materialize(first_sample(trace.example, trace.samples), like.device, like.dtype, seed=0)
            before = _outputs(copy, places, example)
            for layer, own in factors.items():
                _scale(copy.slots[layer], own)
            for norm, slices in places.items():
                _divide(copy.slots[norm], slices, factors)
            after = _outputs(copy, places, example)
        except (Exception, SystemExit):  # whatever the network's own code does with them
            return NO_NORM
    for norm, expected in before.items():
        if (norm != NO_NORM and not expected) or not _are_close(after[norm], expected):
            return norm
    return None


def _are_close(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) and all(map(_close, found, expected))


def _outputs(network: Network, norms: Iterable[str], example: Any) -> dict[str, list[Tensor]]:
    """Return the norms' last outputs by name, then the network's under NO_NORM."""
    seed_all(0)
    with outputs_of({name: network.slots[name] for name in norms}) as found:
        whole = call(network.model, fresh(example))
        made = {name: _floats(found.get(name)) for name in norms}
    return made | {NO_NORM: _floats(whole)}


def _floats(output: Any) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors_in(output) if tensor.is_floating_point()]


def _divide(norm: nn.Module, slices: Iterable[tuple[str, int, int]], factors: Mapping[str, Tensor]) -> None:
    """Have what a norm reads divided by the factors of the layers that make it."""

    def divided(module: nn.Module, args: Any, kwargs: Any) -> Any:
        x = next(iter(tensors_in((args, kwargs))))
        own = torch.ones(x.shape[1], dtype=torch.float32)
        for layer, start, stop in slices:
            own[start:stop] = factors[layer]
        return tree_map(lambda leaf: x / _along_channels(own, x) if leaf is x else leaf, (args, kwargs))

    norm.register_forward_pre_hook(divided, with_kwargs=True)


def _scale(layer: nn.Module, factors: Tensor) -> None:
    """Multiply the filters and the bias of a copy."""
    for parameter in (layer._parameters.get("weight"), layer._parameters.get("bias")):
        if parameter is not None:
            parameter.copy_(times(parameter, factors.tolist(), **layout_of(layer)))


def _factors(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = torch.randint(-1, 2, (count,), generator=generator)
    sign = 2 * torch.randint(0, 2, (count,), generator=generator) - 1
    sign[:1] = -1  # of few channels all could be positive, to which a bend at zero is none
    return 2.0**size * sign


def _along_channels(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like).view(1, -1, *(1 for _ in like.shape[2:]))


def _close(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    largest = float(expected.abs().nan_to_num().amax()) if expected.numel() else 0.0
    return torch.allclose(found, expected, rtol=0, atol=TOLERANCE * largest, equal_nan=True)


def _sample(layer: nn.Module) -> Tensor:
    """Return a sample that a layer's kernel just fits in."""
    weight: Tensor = layer._parameters["weight"]  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(0)
    if isinstance(layer, nn.Linear):
        shape = [1, layer.in_features]
    else:
        conv: Any = layer
        reach = [d * (k - 1) + 1 for d, k in zip(conv.dilation, weight.shape[2:], strict=True)]
        shape = [1, conv.in_channels, *(2 if getattr(conv, "transposed", False) else size for size in reach)]
    return normal(shape, generator).to(weight)
