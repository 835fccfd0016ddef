"""Make up example inputs for a model that says nothing about them."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from normswap.limits import MAX_ELEMENTS
from normswap.networks.recognition import is_batch_norm, norm_parts
from normswap.tracing.arguments import NODES, TOKENS, Meaning, arguments, calls
from normswap.tracing.stated import stated_channels, stated_shapes, stated_size

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

FRAMES = 5
"""Frames of a made-up video, or samples of which a spiking network takes all steps at once."""

LENGTHS, WAVES = (64, 200), (16000, 4000)
"""Lengths of made-up series of frames, and of waveforms."""

MOST_FEATURES = 6
"""Layers that are asked how many features a frame may have."""


def candidates(model: nn.Module, batch: int = 2) -> Iterator[Any]:
    """Yield example inputs of meta tensors that the model may accept, likeliest first.

    Sizes come from what the model states: timm's ``pretrained_cfg``, attributes, a configuration; else channels and
    rank come from the first layers that tell them: a convolution, a linear layer or a norm. What else a forward pass
    requires comes from the names of its parameters; those that say nothing get the same tensor (two frames of a video).
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    wanted, by_keyword = arguments(model)
    if any(one.meaning is Meaning.EDGES for one in wanted):
        batch = NODES
    for shape in dict.fromkeys(_shapes(model)):
        main = torch.empty(batch, *shape, dtype=dtype, device="meta")
        yield from calls(wanted, main, by_keyword)
        if any(one.meaning is not Meaning.DATA for one in wanted) and not by_keyword:
            yield (main,) * len(wanted)
    if any(isinstance(module, nn.Embedding) for module in model.modules()):
        tokens = torch.empty(batch, TOKENS, dtype=torch.long, device="meta")
        yield dict.fromkeys((one.name for one in wanted), tokens) if by_keyword else (tokens,) * len(wanted)


def _shapes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    declared = _declared_size(model)
    if declared is not None:
        yield declared
    yield from stated_shapes(model)
    told = False
    for module in model.modules():
        if isinstance(module, _ConvNd):
            yield from _around(model, module)
            told = True
            break
        if isinstance(module, nn.Linear):
            yield from ((module.in_features,), (4, module.in_features))
            told = True
            break
        if is_batch_norm(module):
            ranks = (0, 1) if isinstance(module, nn.BatchNorm1d) else (2, 1, 3, 0)
            yield from ((norm_parts(module).num_channels, *SIZES[rank][-1]) for rank in ranks)
            told = True
            break
    yield from _series(model)
    if told:
        yield from _later_layers(model)


def _around(model: nn.Module, conv: _ConvNd) -> Iterator[tuple[int, ...]]:
    """Yield shapes that a first convolution tells."""
    rank = len(conv.kernel_size)
    sizes = SIZES[rank]
    if stated := stated_size(model, rank):
        yield conv.in_channels, *stated
    yield from ((conv.in_channels, *size) for size in sizes)
    if rank == 1 and conv.in_channels == 1:
        yield (16000,)  # a waveform without a channel axis
    yield from ((channels, *sizes[0]) for channels in (3, 1) if channels != conv.in_channels)
    if rank:  # frames of a video, or all steps of all samples
        yield from ((FRAMES, conv.in_channels, *size) for size in sizes[1:3])


def _series(model: nn.Module) -> Iterator[tuple[int, ...]]:
    """Yield shapes of frames and of signals: features first or last, as a network states them or its layers do."""
    features = [*stated_channels(model)]
    for module in model.modules():
        if isinstance(module, _ConvNd) and len(module.kernel_size) == 1:
            features.append(module.in_channels)
        elif isinstance(module, nn.Linear):
            features.append(module.in_features)
        if len(features) > MOST_FEATURES:
            break
    for number in dict.fromkeys(features):
        for length in LENGTHS:
            yield length, number
            yield number, length
        yield (number,)
    yield from ((length,) for length in WAVES)


def _later_layers(model: nn.Module) -> Iterator[tuple[int, ...]]:
    """Yield shapes that layers tell which are registered behind the first one and may run before it."""
    convs = [module for module in model.modules() if isinstance(module, _ConvNd)]
    for channels, rank in dict.fromkeys((conv.in_channels, len(conv.kernel_size)) for conv in convs[1:]):
        yield channels, *SIZES[rank][1 if rank else 0]


def _declared_size(model: nn.Module) -> tuple[int, ...] | None:
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    size = config.get("input_size") if isinstance(config, Mapping) else None
    if not isinstance(size, (list, tuple)) or not all(type(side) is int and side > 0 for side in size):
        return None
    return tuple(size) if 0 < math.prod(size) <= MAX_ELEMENTS else None
