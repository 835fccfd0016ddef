"""Whether norms and filters are as initialization leaves them: only then may filters be overwritten."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from normswap.layers.convs import layout_of
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


def first_not_initialized(layers: Mapping[str, nn.Module]) -> str | None:
    """Return the name of the first layer whose filters could not be what initializers draw; None where all could be.

    They draw independently around zero with one variance. Of N draws with the deviation σ a filter's mean has the
    deviation σ/√N, and its variance the relative one √((κ − 1)/N) with the kurtosis κ. Trained filters differ from each
    other by much more. Between positions of the kernel there is no correlation r: over M planes the sum of M·r² is
    distributed as χ². Neighbours in trained kernels resemble each other after few steps.

    Layers of one size are looked at together, as each alone is mostly overhead.
    """
    alike: dict[Any, dict[str, Tensor]] = {}
    for name, layer in layers.items():
        rows = _rows(layer)
        if rows is None:
            continue
        rows = rows[:: max(len(rows) // ROWS, 1), :COLUMNS]
        positions = layer._parameters["weight"][0, 0].numel()  # type: ignore[index]
        alike.setdefault((positions, rows.shape, rows.dtype, rows.device), {})[name] = rows
    found = set[str]()
    for (positions, *_), parts in alike.items():
        shown = _could_be_drawn(torch.stack(list(parts.values())), positions).tolist()
        found.update(name for name, could_be in zip(parts, shown, strict=True) if not could_be)
    return next((name for name in layers if name in found), None)


def _could_be_drawn(rows: Tensor, positions: int) -> Tensor:
    """Return for each layer of (layers, filters, values) whether initialization could have made it.

    A filter's values are planes of so many positions.
    """
    rows = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
    rows = rows / rows.abs().amax((1, 2), keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    _, count, length = rows.shape
    var, mean = torch.var_mean(rows, 2, correction=0, keepdim=True)
    scale = var.mean((1, 2))
    unknown = ~(scale > 0)
    if length < 2:
        return torch.ones_like(unknown)
    least = var.clamp_min(1e-3 * scale[:, None, None])
    kurtosis = ((rows - mean).square() / least).square().mean((1, 2))
    allowed = 1 + SPREAD * (2 / count) ** 0.5
    means, spread = length * mean.square().mean((1, 2)) / scale, (var / scale[:, None, None]).var((1, 2), correction=0)
    shown: Tensor = (means < allowed * length / (length - 1)) & (spread < allowed * kurtosis / (length - 1))
    return unknown | (shown & _positions_are_apart(rows, positions))


def _positions_are_apart(rows: Tensor, positions: int) -> Tensor:
    """Return for each layer whether the positions of its kernel are as little correlated as independent draws."""
    layers, count, length = rows.shape
    planes, pairs = length // positions, positions * (positions - 1) // 2
    if not planes or not pairs:
        return rows.new_ones(layers, dtype=torch.bool)
    sizes = rows.square().mean(2, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny).sqrt()
    own = (rows / sizes)[..., : planes * positions].reshape(layers, count * planes, positions)
    products = own.mT @ own
    spread = products.diagonal(dim1=1, dim2=2).clamp_min(torch.finfo(rows.dtype).tiny).rsqrt()
    r = (spread.unsqueeze(2) * products * spread.unsqueeze(1)).triu(1)
    chi2 = count * planes * r.square().sum((1, 2))
    error = (2 / (9 * pairs)) ** 0.5  # the cube root is distributed normally (Wilson & Hilferty 1931)
    apart: Tensor = (chi2 / pairs).pow(1 / 3) < 1 - error**2 + SPREAD * error
    return apart


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
    return filters(weight.detach(), **layout_of(layer))
