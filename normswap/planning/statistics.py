"""The statistics that a new norm will meet: BatchNorm's running ones, behind the filters as they will be."""

import math
from collections.abc import Mapping

from torch import Tensor, nn

from normswap.layers.matching import standardized_statistics
from normswap.layers.standardization import filters
from normswap.networks.recognition import norm_parts
from normswap.planning.plan import Entry


def statistics_before(
    norm: Entry, modules: Mapping[str, nn.Module], convs: Mapping[str, Entry]
) -> tuple[Tensor, Tensor] | None:
    """Return the (C,) mean and variance of a norm's input after conversion; None where it keeps none.

    Args:
        norm: The norm's entry.
        modules: The unconverted layers by name.
        convs: The convolutions' entries by name; one in the standard form changes what its norm meets.
    """
    parts = norm_parts(modules[norm.name])
    if parts.mean is None or parts.var is None or parts.mean.is_meta:
        return None
    mean, var = parts.mean.detach().double(), parts.var.detach().double()
    feeder = convs.get(norm.fed_by[0]) if len(norm.fed_by) == 1 else None
    if feeder is None or feeder.ws != "standard" or feeder.channels != norm.channels:
        return mean, var
    conv = modules[feeder.name]
    if getattr(conv, "transposed", False):
        return mean, var
    rows, bias = filters(conv.weight.detach()), conv._parameters.get("bias")  # type: ignore[operator]
    return standardized_statistics(rows, None if bias is None else bias.detach(), mean, var)


def usable(mean: Tensor, var: Tensor) -> bool:
    """Tell whether statistics are finite and no variance is negative."""
    return math.isfinite(float((mean + var).sum())) and float(var.amin()) >= 0
