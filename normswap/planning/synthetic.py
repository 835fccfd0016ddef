"""Made-up inputs with the statistics of natural ones, for networks whose images are not at hand.

Inputs are dead leaves: shapes that cover each other, a few large and many small, over textures with 1/fᵃ spectra (Lee,
Mumford & Huang 2001). Colours vary far more in luminance than in hue (Ruderman, Cronin & Chiao 1998); channels that are
no colours see the same thing but for a part of their own.
"""

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from normswap.networks.randomness import normal, uniform

COUNT, BATCH = 64, 16
"""Inputs that are made where nobody says how many, and how many at a time."""

OPPONENT = ((0.577, 0.707, 0.408), (0.577, 0.0, -0.816), (0.577, -0.707, 0.408))
"""Red, green and blue from luminance, red against blue, and green against magenta."""

SPREAD = (1.0, 0.28, 0.12)
"""Deviations along these axes in natural images."""


def synthetic(
    shape: tuple[int, ...],
    *,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    count: int = COUNT,
    seed: int = 0,
) -> Iterator[Tensor]:
    """Yield batches of made-up inputs.

    >>> batches = list(synthetic((3, 224, 224), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)))

    Args:
        shape: (C, *) of one input, of rank 1 to 3 beside the channels.
        mean: What is taken off each channel of an image whose values are from 0 to 1; by default 0.5.
        std: What each channel is divided by afterwards; by default 0.25.
        count: Inputs in all.
        seed: Of the random numbers; torch's own are left alone.
    """
    generator = torch.Generator().manual_seed(seed)
    axes = (-1, *(1 for _ in shape[1:]))
    channels = shape[0]
    off, by = (_floats(value).view(axes) for value in (mean or (0.5,) * channels, std or (0.25,) * channels))
    pool = _textures(shape, generator)
    for start in range(0, count, BATCH):
        made = [_leaves(pool, generator) for _ in range(min(BATCH, count - start))]
        yield torch.stack([(values - off) / by for values in made])


_floats = partial(torch.tensor, dtype=torch.float32)


def _textures(shape: tuple[int, ...], generator: torch.Generator, number: int = 8) -> Tensor:
    """Return (number, C, *) noise with 1/fᵃ spectra and a deviation of one in luminance; it tiles."""
    channels, *sides = shape
    kind = torch.float32
    frequencies = [
        *(torch.fft.fftfreq(side, dtype=kind) for side in sides[:-1]),
        torch.fft.rfftfreq(sides[-1], dtype=kind),
    ]
    radius = sum(f.square() for f in torch.meshgrid(*frequencies, indexing="ij")).sqrt()  # type: ignore[union-attr]
    radius.view(-1)[0] = 1 / max(sides)
    power = 0.7 + 1.2 * uniform((number, 1, *(1 for _ in sides)), generator)
    noise = normal((number, channels, *radius.shape, 2), generator)
    waves = torch.view_as_complex(noise) * (-power * radius.log()).exp()
    waves.flatten(2)[..., 0] = 0
    texture = torch.fft.irfftn(waves, s=sides, dim=list(range(2, 2 + len(sides))))
    texture = texture / texture.flatten(2).std(2).clamp_min(1e-6).view(number, channels, *(1 for _ in sides))
    return _mixed(texture, generator)


def _mixed(values: Tensor, generator: torch.Generator) -> Tensor:
    """Give independent channels the correlation of colours, or of channels that see the same thing."""
    if values.shape[1] == 3:
        spread = _floats(SPREAD) * torch.exp(0.4 * normal((len(values), 3), generator))
        spread[:, 0] = 1
        return torch.einsum("ij,nj,nj...->ni...", _floats(OPPONENT), spread, values)
    return values[:, :1] * 0.9 + values * 0.45 if values.shape[1] > 1 else values


def _colours(number: int, channels: int, generator: torch.Generator) -> Tensor:
    """Return (number, C) colours, most of them grey."""
    luminance = uniform((number, 1), generator)
    if channels == 3:
        chroma = normal((number, 2), generator) * _floats((0.13, 0.055))
        chroma = chroma * torch.exp(0.6 * normal((number, 1), generator))
        hue = torch.cat([torch.zeros_like(luminance), chroma], 1) @ _floats(OPPONENT).T
        return luminance + 1.7 * hue
    return luminance + 0.1 * normal((number, channels), generator)


def _leaves(pool: Tensor, generator: torch.Generator) -> Tensor:
    """Paint one input (C, *): ground, shapes from a few to many, light, contrast, and a camera's soft shoulder."""
    _, channels, *sides = pool.shape
    chance = uniform((8,), generator).tolist()
    ground, other = (pool[int(index)] for index in torch.randint(len(pool), (2,), generator=generator))
    shifts = [int(torch.randint(side, (1,), generator=generator)) for side in sides]
    number = int(3 * 45 ** chance[0])
    colours = _colours(number + 1, channels, generator)
    axes = (-1, *(1 for _ in sides))
    image = colours[-1].view(axes) + 0.18 * math.exp(chance[1] - 0.5) * ground.roll(
        shifts, list(range(1, pool.ndim - 1))
    )
    low, high = 0.02 * max(sides), 0.5 * max(sides)
    radii = (low**-1.2 + uniform((number,), generator) * (high**-1.2 - low**-1.2)) ** (-1 / 1.2)
    rows = uniform((number, 6 + len(sides)), generator).tolist()
    for colour, radius, row in zip(colours, radii.tolist(), rows, strict=False):
        _paint(image, other, colour.view(axes), radius, row)
    image = 0.5 + (image - 0.5) * (0.45 + 0.8 * chance[2]) + 0.35 * (chance[3] - 0.5)
    signed: Tensor = 2 * (image - 0.5)
    return 0.5 + 0.5 * signed / (1 + signed.abs() ** 3) ** (1 / 3)


def _paint(image: Tensor, texture: Tensor, colour: Tensor, radius: float, row: list[float]) -> None:
    """Cover a part of an input (C, *) with one ellipse or box, where its edges do not reach beyond it."""
    kind, aspect, angle, rough, edge, slope, *place = row
    sides, reach = image.shape[1:], radius * max(1.0, 0.35 + aspect) * 1.42
    centres = [where * side for where, side in zip(place, sides, strict=True)]
    spans = [(max(0, int(c - reach)), min(side, int(c + reach) + 1)) for c, side in zip(centres, sides, strict=True)]
    inside = (slice(None), *(slice(*span) for span in spans))
    lines = (torch.arange(*span, dtype=torch.float32) - c for span, c in zip(spans, centres, strict=True))
    grids = torch.meshgrid(*lines, indexing="ij")
    along = [grid / radius for grid in grids]
    if len(along) > 1:
        turn, last = angle * math.pi, 0.35 + aspect
        u, v = along[-2], along[-1]
        along[-2:] = [
            u * math.cos(turn) + v * math.sin(turn),
            (v * math.cos(turn) - u * math.sin(turn)) / last,
        ]
    squares = torch.stack([value.square() for value in along])
    distance = squares.sum(0) if kind < 0.6 else squares.amax(0)
    cover = ((1 - distance) * radius * (0.5 if edge < 0.8 else 0.08)).clamp(0, 1)
    fill = colour + 0.25 * rough**2 * texture[inside] + 0.25 * (slope - 0.5) * along[0]
    image[inside] = torch.lerp(image[inside], fill, cover.expand_as(fill))
