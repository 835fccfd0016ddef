"""Affine values with which a GroupNorm does what a trained BatchNorm did: tensors in, tensors out."""

import torch
from torch import Tensor


def closed_form(
    weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, *, eps: float, num_groups: int
) -> tuple[Tensor, Tensor]:
    """Return GroupNorm's (C,) weight and bias from BatchNorm's affine part and running statistics.

    BatchNorm in eval mode is ``a·x + b`` with ``a = weight/√(var + eps)`` and ``b = bias − a·mean``. A group of
    channels has mean ``μ = mean(mean)`` and, by the law of total variance, variance
    ``σ² = mean(var + eps) + mean((mean − μ)²)``. Then ``a·σ`` and ``b + a·μ`` make GroupNorm equal to
    BatchNorm wherever a sample's group statistics are the running ones.

    >>> ones, zeros = torch.ones(4), torch.zeros(4)
    >>> closed_form(ones, zeros, zeros, ones, eps=0.0, num_groups=2)
    (tensor([1., 1., 1., 1.]), tensor([0., 0., 0., 0.]))

    A channel with zero running variance is constant: any scale reproduces it, so it gets the group's, which keeps it
    from amplifying noise.

    Args:
        weight: γ, shape (C,).
        bias: β, shape (C,).
        mean: Running mean, shape (C,).
        var: Running variance, shape (C,), not negative.
        eps: BatchNorm's epsilon; GroupNorm keeps it.
        num_groups: Groups of C/num_groups neighbouring channels.
    """
    dtype = weight.dtype
    weight, bias, mean, var = (value.double() for value in (weight, bias, mean, var))
    group_mean = _spread(mean.view(num_groups, -1).mean(1), mean)
    group_var = _spread((var + eps + (mean - group_mean).square()).view(num_groups, -1).mean(1), var)
    scale = torch.where(var > 0, weight / (var + eps).sqrt(), weight / group_var.sqrt())
    return (scale * group_var.sqrt()).to(dtype), (bias - scale * (mean - group_mean)).to(dtype)


def scale_and_shift(weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """Return BatchNorm's eval function as a (C,) scale ``weight/√(var + eps)`` and shift ``bias − scale·mean``.

    Args as for `closed_form`.
    """
    scale = weight.double() / (var.double() + eps).sqrt()
    return scale.to(weight.dtype), (bias.double() - scale * mean.double()).to(weight.dtype)


def standardized_statistics(rows: Tensor, bias: Tensor | None, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Return running statistics as they would be behind the standardized filters.

    Dividing filter c by its standard deviation divides its output's by the same; what removing the filter's mean does
    depends on the input and is left out.

    Args:
        rows: Filters, shape (C, fan_in).
        bias: The convolution's bias, shape (C,), or None.
        mean: Running mean, shape (C,).
        var: Running variance, shape (C,).
    """
    std = rows.double().std(dim=1, correction=0).clamp_min(1e-12)
    shift = torch.zeros_like(std) if bias is None else bias.double()
    return (mean.double() - shift) / std + shift, var.double() / std.square()


def centred(rows: Tensor) -> Tensor:
    """Return filters (C, fan_in) of mean zero and one common standard deviation, the root mean square of theirs.

    Standardization sees no difference, and a plain convolution with these filters in front of a GroupNorm computes the
    same function, so a checkpoint that is loaded without normswap is not silently wrong. The layer keeps its scale,
    and with it the size of its optimizer steps relative to its weights.
    """
    wide = rows.double()
    wide = wide - wide.mean(1, keepdim=True)
    std = wide.square().mean(1, keepdim=True).sqrt()
    common = std.square().mean().sqrt()
    return torch.where(std > 0, wide / std.clamp_min(1e-300) * common, wide).to(rows.dtype)


def _spread(groups: Tensor, channels: Tensor) -> Tensor:
    return groups.repeat_interleave(channels.numel() // groups.numel())
