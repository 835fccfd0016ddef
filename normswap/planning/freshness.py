"""Whether norms and filters are as initialization leaves them: only then may filters be overwritten."""

from typing import Any

import torch
from torch import Tensor, nn

from normswap.layers.standardization import EPS, filters
from normswap.networks.recognition import norm_parts

ROWS, COLUMNS = 64, 256
"""Filters, and values of each, that are looked at."""

SPREAD = 8
"""Standard errors that statistics of random filters may be off."""


def is_fresh(norm: nn.Module) -> bool:
    """Tell whether a norm shows that no training has reached it; one on the meta device has nothing to lose.

    Shown is it by a count of batches that is 0, or by an affine part that would be trained and has its initial values.
    A norm that holds neither, a frozen or folded one, shows nothing.
    """
    parts, count = norm_parts(norm), norm._buffers.get("num_batches_tracked")
    if parts.is_trained:
        return False
    if count is not None and parts.mean is not None:
        return count.is_meta or int(count) == 0
    own = [value for value in (parts.weight, parts.bias) if value is not None]
    return any(value.requires_grad or value.is_meta for value in own)


def are_initialized(layer: nn.Module) -> bool:
    """Tell whether filters could be independent draws around zero with one variance, as initializers make them.

    Of N draws with the deviation σ a filter's mean has the deviation σ/√N, and its variance the relative one
    √((κ − 1)/N) with the kurtosis κ. Trained filters differ from each other by much more.
    """
    rows = _rows(layer)
    if rows is None:
        return True
    rows = rows[:: max(len(rows) // ROWS, 1), :COLUMNS]
    rows = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
    rows = rows / rows.abs().amax().clamp_min(torch.finfo(rows.dtype).tiny)
    count, length = rows.shape
    var, mean = torch.var_mean(rows, 1, correction=0, keepdim=True)
    scale = var.mean()
    if not scale > 0 or length < 2:
        return True
    kurtosis = ((rows - mean).square() / var.clamp_min(1e-3 * scale)).square().mean()
    allowed = 1 + SPREAD * (2 / count) ** 0.5
    means, spread = length * mean.square().mean() / scale, (var / scale).var(correction=0)
    return bool((means < allowed * length / (length - 1)) & (spread < allowed * kurtosis / (length - 1)))


def cannot_grow(layer: nn.Module, *, added: bool) -> bool:
    """Tell whether standardization would hold filters at next to nothing.

    The deviation of a standardized filter is the gain, which is √eps where the filter is constant. A norm that is fed
    by it alone does not mind; a sum does, in which small filters begin to count as they grow.

    Args:
        layer: A convolution.
        added: Whether its output is added to others before a norm.
    """
    rows = _rows(layer)
    if rows is None:
        return False
    if bool((rows[:4, :COLUMNS].double().var(1, correction=0) > EPS).all()):  # as nearly always
        return added and _mostly_zero(rows)
    var = rows.double().var(1, correction=0)
    return bool((var <= (EPS if added else 0)).float().mean() >= 0.5)


def _mostly_zero(rows: Tensor) -> bool:
    """Tell whether half of the filters have a first value of zero, and then whether they are zero throughout."""
    if int((rows[:, 0] == 0).sum()) * 2 < len(rows):
        return False
    return bool((rows == 0).all(1).float().mean() >= 0.5)


def _rows(layer: nn.Module) -> Tensor | None:
    """Return the filters, (out_channels, fan_in); None without data."""
    weight = layer._parameters.get("weight")
    if weight is None or weight.is_meta:
        return None
    layout: dict[str, Any] = {"transposed": getattr(layer, "transposed", False), "groups": getattr(layer, "groups", 1)}
    return filters(weight.detach(), **layout)
