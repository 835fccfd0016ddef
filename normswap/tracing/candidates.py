"""Make up example inputs for a model that says nothing about them."""

import inspect
import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from normswap.limits import MAX_ELEMENTS
from normswap.networks.recognition import is_batch_norm, norm_parts

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
