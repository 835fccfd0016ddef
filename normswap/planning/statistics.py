"""The statistics that a new norm will meet: BatchNorm's running ones, behind the filters as they will be."""

import math
from collections.abc import Mapping

from torch import Tensor

from normswap.errors import BadStatistics
from normswap.layers.matching import standardized_statistics
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
    conv = network.slots[feeder.name]
    if getattr(conv, "transposed", False):
        return mean, var
    rows, bias = filters(conv.weight.detach()), conv._parameters.get("bias")  # type: ignore[operator]
    return standardized_statistics(rows, None if bias is None else bias.detach(), mean, var)


def bad_statistics(name: str) -> BadStatistics:
    """Return the error for a norm whose statistics are not `usable`."""
    return BadStatistics(
        f"{name}: running statistics are negative or not finite; repair the checkpoint or pass affine='copy'"
    )


def usable(mean: Tensor, var: Tensor) -> bool:
    """Tell whether statistics are finite and no variance is negative."""
    return math.isfinite(float((mean + var).sum())) and float(var.amin()) >= 0
