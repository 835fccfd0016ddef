"""Make up example inputs for a model that says nothing about them."""

import inspect
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_map_only

from normswap.networks.recognition import is_batch_norm, norm_parts
from normswap.planning.schema import MAX_ELEMENTS

SIZES: dict[int, tuple[tuple[int, ...], ...]] = {
    0: ((),),
    1: ((224,), (64,), (1024,), (16000,), (16,)),
    2: tuple((side, side) for side in (224, 64, 32, 256, 128, 299, 512, 16, 8)),
    3: (
        (32, 32, 32),
        (16, 112, 112),
        (16, 224, 224),
        (64, 64, 64),
        (96, 96, 96),
        (128, 128, 128),
        (16, 16, 16),
        (8, 8, 8),
    ),
}
"""Spatial sizes of made-up inputs by rank, in the order they are tried."""


def as_call(example_input: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword arguments: a tuple is positional arguments, a dict keyword arguments."""
    if isinstance(example_input, tuple):
        return example_input, {}
    if isinstance(example_input, Mapping):
        return (), dict(example_input)
    return (example_input,), {}


def call(model: nn.Module, example_input: Any) -> Any:
    """Return the model's output for a tensor, a tuple of positional arguments or a dict of keyword arguments."""
    args, kwargs = as_call(example_input)
    return model(*args, **kwargs)


def candidates(model: nn.Module, batch: int = 2) -> Iterator[tuple[Tensor, ...]]:
    """Yield arguments of meta tensors that the model may accept, likeliest first.

    The size comes from timm's ``pretrained_cfg`` where there is one, else channels and rank come from the first layer
    that tells them: a convolution, a linear layer or a norm. A forward pass that requires several arguments gets the
    same tensor for each (two frames of a video, a pair of images).
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    for shape in _shapes(model):
        yield (torch.empty(batch, *shape, dtype=dtype, device="meta"),) * _required_arguments(model)
    if any(isinstance(module, nn.Embedding) for module in model.modules()):
        yield (torch.empty(batch, 16, dtype=torch.long, device="meta"),) * _required_arguments(model)


def _shapes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    declared = _declared_size(model)
    if declared is not None:
        yield declared
    for module in model.modules():
        if isinstance(module, _ConvNd):
            sizes = SIZES[len(module.kernel_size)]
            if stated := _stated_size(model, len(module.kernel_size)):
                yield module.in_channels, *stated
            yield from ((module.in_channels, *size) for size in sizes)
            if len(module.kernel_size) == 1 and module.in_channels == 1:
                yield (16000,)  # a waveform without a channel axis
            yield from ((channels, *sizes[0]) for channels in (3, 1) if channels != module.in_channels)
            return
        if isinstance(module, nn.Linear):
            yield from ((module.in_features,), (4, module.in_features))
            return
        if is_batch_norm(module):
            yield from ((norm_parts(module).num_channels, *SIZES[rank][-1]) for rank in (2, 1, 3, 0))
            return


def _required_arguments(model: nn.Module) -> int:
    parameters = inspect.signature(model.forward).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return max(sum(p.kind in positional and p.default is p.empty for p in parameters), 1)


def _stated_size(model: nn.Module, rank: int) -> tuple[int, ...] | None:
    """Return the spatial size that a model, or the configuration it carries, keeps under one of the usual names."""
    for holder in (model, getattr(model, "config", None)):
        for name in ("in_size", "img_size", "image_size", "input_size"):
            value = getattr(holder, name, None)
            sides = (value,) * rank if isinstance(value, int) else value
            if isinstance(sides, (tuple, list)) and len(sides) == rank and all(type(side) is int for side in sides):
                return tuple(sides)
    return None


def _declared_size(model: nn.Module) -> tuple[int, ...] | None:
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    size = config.get("input_size") if isinstance(config, Mapping) else None
    if not isinstance(size, (list, tuple)) or not all(type(side) is int and side > 0 for side in size):
        return None
    return tuple(size) if 0 < math.prod(size) <= MAX_ELEMENTS else None


def batch_size(value: Any) -> int:
    """Return how many samples an example holds: the length of a list, or the first size of the first tensor."""
    if isinstance(value, list):
        return len(value)
    if isinstance(value, Tensor):
        return value.shape[0] if value.ndim else 1
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple) else ()
    return batch_size(next(iter(items))) if items else 1


def materialize(value: Any, device: torch.device, dtype: torch.dtype, *, seed: int) -> Any:
    """Return random tensors of the same shapes: normal floats (of `dtype` where float32), zeros for whole numbers."""
    generator = torch.Generator().manual_seed(seed)

    def made(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
        kind = dtype if tensor.dtype is torch.float32 else tensor.dtype
        return torch.randn(tensor.shape, generator=generator).to(device, kind)

    return tree_map_only(Tensor, made, value)


def vary(value: Any, batch: int, *, seed: int) -> Any:
    """Return the example with every sample but the first replaced by another random one."""
    generator = torch.Generator().manual_seed(seed)

    def other(tensor: Tensor) -> Tensor:
        noise = torch.randn(tensor.shape, generator=generator).to(tensor.device, tensor.dtype)
        return noise if tensor.is_floating_point() else tensor

    if isinstance(value, tuple):
        return tuple(vary(item, batch, seed=seed) for item in value)
    if isinstance(value, list):
        return [*value[:1], *(tree_map_only(Tensor, other, item) for item in value[1:])]
    return tree_map_only(
        Tensor, lambda t: torch.cat([t[:1], other(t[1:])]) if t.ndim and t.shape[0] == batch else t, value
    )


def describe(value: Any) -> Any:
    """Return example inputs as JSON data: shapes and types, no values. None where a part is no tensor or container."""
    if isinstance(value, Tensor):
        return {"tensor": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, (list, tuple)):
        items = [describe(item) for item in value]
        return None if None in items else {type(value).__name__: items}
    if isinstance(value, Mapping):
        fields = {str(key): describe(item) for key, item in value.items()}
        return None if None in fields.values() else {"dict": fields}
    return None


def rebuild(spec: Any) -> Any:
    """Return meta tensors in the containers that `describe` recorded.

    Raises:
        ValueError: The data is not what `describe` writes.
    """
    if not isinstance(spec, dict) or not spec:
        raise ValueError(f"an example input cannot be {spec!r}")
    if "tensor" in spec:
        dtype = getattr(torch, str(spec.get("dtype")), None)
        shape = spec["tensor"]
        if not isinstance(dtype, torch.dtype) or not all(isinstance(n, int) and 0 <= n < 2**20 for n in shape):
            raise ValueError(f"{spec!r} is not a tensor's shape and dtype")
        return torch.empty(shape, dtype=dtype, device="meta")
    ((kind, items),) = spec.items()
    if kind == "dict":
        return {key: rebuild(item) for key, item in items.items()}
    if kind in ("list", "tuple"):
        return [rebuild(item) for item in items] if kind == "list" else tuple(rebuild(item) for item in items)
    raise ValueError(f"{kind!r} is not a container of example inputs")
