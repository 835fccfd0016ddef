"""The statistics that a new norm will meet: BatchNorm's running ones, behind the filters as they will be."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from normswap.errors import BadStatistics
from normswap.layers.convs import layout_of
from normswap.layers.matching import HEARD, group_moments, is_constant, standardized_statistics
from normswap.layers.standardization import filters
from normswap.networks.network import Network
from normswap.networks.recognition import norm_parts
from normswap.planning.choices import WS
from normswap.planning.entry import ConvEntry, NormEntry


def statistics_before(
    norm: NormEntry, network: Network, convs: Mapping[str, ConvEntry]
) -> tuple[Tensor, Tensor] | None:
    """Return the (C,) mean and variance of a norm's input after conversion; None where it keeps none.

    Args:
        norm: The norm's entry.
        network: The unconverted network.
        convs: The convolutions' entries by name; one in the standard form changes what its norm meets.
    """
    parts = norm_parts(network.slots[norm.name])
    if parts.mean is None or parts.var is None or parts.mean.is_meta:
        return None
    mean, var = parts.mean.detach().double(), parts.var.detach().double()
    feeder = convs.get(norm.fed_by[0]) if len(norm.fed_by) == 1 else None
    if feeder is None or feeder.ws is not WS.STANDARD or feeder.channels != norm.channels:
        return mean, var
    conv: Any = network.slots[feeder.name]
    rows, bias = filters(conv.weight.detach(), **layout_of(conv)), conv._parameters.get("bias")
    return standardized_statistics(rows, None if bias is None else bias.detach(), mean, var)


def drowned(norm: NormEntry, network: Network) -> list[int]:
    """Return the channels that BatchNorm hears and GroupNorm loses in the rounding of what is beside them."""
    parts = norm_parts(network.slots[norm.name])
    if parts.mean is None or parts.var is None or parts.mean.is_meta:
        return []
    mean, var = parts.mean.detach().double(), parts.var.detach().double()
    if float(var.min()) > 1e-11 * float((var + mean.square()).max()) or not usable(mean, var):
        return []
    mean, var = (values.view(norm.groups or 1, -1) for values in (mean, var))
    group_mean, group_var = group_moments(mean, var, per_position=norm.per_position)
    lost = is_constant(mean - group_mean, var, group_var, eps=parts.eps, dtype=parts.var.dtype)
    heard: list[int] = (lost & (var > HEARD * parts.eps)).flatten().nonzero().flatten().tolist()
    return heard


def bad_statistics(name: str) -> BadStatistics:
    """Return the error for a norm whose statistics are not `usable`."""
    return BadStatistics(
        f"{name}: running statistics are negative or not finite; repair the checkpoint or pass affine='copy'"
    )


def usable(mean: Tensor, var: Tensor) -> bool:
    """Tell whether statistics are finite and no variance is negative."""
    return math.isfinite(float((mean + var).sum())) and float(var.amin()) >= 0


def is_silent(gamma: Tensor | None) -> bool:
    """Tell whether a norm's γ is zero throughout, as some networks start: it says nothing of what channels matter."""
    return gamma is not None and not gamma.is_meta and not bool(gamma.any())


def loud(gamma: Tensor) -> Tensor:
    """Return γ, (C,), and one in place of a `is_silent` one: as training will have it."""
    return torch.ones_like(gamma) if is_silent(gamma) else gamma
