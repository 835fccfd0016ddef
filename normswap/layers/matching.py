"""Affine values with which a GroupNorm does what a trained BatchNorm did: tensors in, tensors out."""

import torch
from torch import Tensor

CONSTANT = 1e-8
"""Share of its group's variance below which a channel counts as constant where BatchNorm's epsilon silences it, too."""

HEARD = 1e-3
"""Variance in BatchNorm's epsilons above which its output tells a channel from a constant."""


def is_constant(
    mean: Tensor, var: Tensor, group_var: Tensor, *, eps: float | Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Tell which channels are constant to GroupNorm: silent, or lost in the rounding of what is beside them.

    Args:
        mean: Means less their group's, (*, G, C/G).
        var: Variances, (*, G, C/G).
        group_var: (*, G, 1), as `group_moments` returns it.
        eps: BatchNorm's epsilon.
        dtype: In which GroupNorm computes; less than float32 counts as float32.
    """
    rounding = (8 * torch.finfo(dtype if dtype is torch.float64 else torch.float32).eps) ** 2
    silent = (var <= CONSTANT * group_var) & (var <= HEARD * eps)
    return silent | (var <= rounding * (group_var + mean.square()))


def closed_form(
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    *,
    eps: float | Tensor,
    norm_eps: float | Tensor,
    num_groups: int,
    per_position: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return GroupNorm's (C,) weight and bias from BatchNorm's affine part and running statistics.

    BatchNorm in eval mode is ``a·x + b`` with ``a = weight/√(var + eps)`` and ``b = bias − a·mean``. A group of
    channels has mean ``μ = mean(mean)`` and, by the law of total variance, variance
    ``σ² = mean(var) + mean((mean − μ)²)``. Then ``a·√(σ² + norm_eps)`` and ``b + a·μ`` make GroupNorm equal to
    BatchNorm wherever a sample's group statistics are the running ones.

    >>> ones, zeros = torch.ones(4), torch.zeros(4)
    >>> closed_form(ones, zeros, zeros, ones, eps=0.0, norm_eps=0.0, num_groups=2)
    (tensor([1., 1., 1., 1.]), tensor([0., 0., 0., 0.]))

    With statistics per position, σ² is the variance that is left at one of them (`group_moments`).

    A channel that `is_constant` is reproduced by any scale, so it gets its group's, which does not amplify its noise.

    Args:
        weight: γ, shape (C,).
        bias: β, shape (C,).
        mean: Running mean, shape (C,).
        var: Running variance, shape (C,), not negative.
        eps: BatchNorm's epsilon.
        norm_eps: GroupNorm's epsilon.
        num_groups: Groups of C/num_groups neighbouring channels.
        per_position: Whether statistics are those of each position, over the channels of a group alone.

    Many norms at a time, (*, C) and epsilons (*,), give (*, C).
    """
    dtype = weight.dtype
    weight, bias, mean, var = (value.double().unflatten(-1, (num_groups, -1)) for value in (weight, bias, mean, var))
    eps, norm_eps = (_by_norm(value, mean, axes=2) for value in (eps, norm_eps))
    group_mean, group_var = group_moments(mean, var, per_position=per_position)
    alive = ~is_constant(mean - group_mean, var, group_var, eps=eps, dtype=dtype)
    group_var = group_var + norm_eps
    scale = weight / torch.where(alive, var + eps, group_var).sqrt()
    gamma, beta = scale * group_var.sqrt(), bias - scale * (mean - group_mean)
    return gamma.flatten(-2).to(dtype), beta.flatten(-2).to(dtype)


def _by_norm(eps: float | Tensor, like: Tensor, *, axes: int) -> Tensor:
    """Return epsilons with as many more axes as a norm's values have."""
    return torch.as_tensor(eps, dtype=like.dtype, device=like.device)[(..., *[None] * axes)]


def group_moments(mean: Tensor, var: Tensor, *, per_position: bool = False) -> tuple[Tensor, Tensor]:
    """Return mean and variance of each group, (*, G, 1), from its channels', (*, G, C/G): the law of total variance.

    Over all positions of a sample that is ``σ² = mean(var) + mean((mean − μ)²)``. At one position t the statistics are
    those of the group's m channels there: their mean ``μ_t``, and ``v_t = mean(x²) − μ_t²``. The first term's
    expectation is ``mean(var) + mean(mean²)``, the second's ``μ² + Var(μ_t)``, so that ``E[v_t] = σ² − Var(μ_t)``: how
    the group's mean moves from one position to the next is no part of it any more. Channels of which variances alone
    are known count as uncorrelated: ``Var(μ_t) = mean(var)/m``, which leaves
    ``E[v_t] = (1 − 1/m)·mean(var) + mean((mean − μ)²)``.
    """
    group_mean = mean.mean(-1, keepdim=True)
    share = 1 - 1 / mean.shape[-1] if per_position else 1.0
    return group_mean, (share * var + (mean - group_mean).square()).mean(-1, keepdim=True)


def damping(mean: Tensor, var: Tensor, *, shrink: float, num_groups: int, per_position: bool = False) -> Tensor:
    """Return the epsilon that draws a sample's group variance s² towards the running one, σ².

    GroupNorm divides by √(s² + ε). With ε = shrink·σ², σ² averaged over the groups, that is a shrinkage estimate of the
    variance, ``(s² + shrink·σ²)/(1 + shrink)``, up to a factor the affine part takes up: samples of little contrast are
    blown up less, as BatchNorm in eval mode does not blow them up at all.

    Args as for `closed_form`; many norms at a time, (*, C), give (*,).
    """
    mean, var = (value.double().unflatten(-1, (num_groups, -1)) for value in (mean, var))
    return shrink * group_moments(mean, var, per_position=per_position)[1].mean((-2, -1))


def drift(
    weight: Tensor,
    mean: Tensor,
    var: Tensor,
    *,
    eps: float | Tensor,
    norm_eps: float | Tensor,
    num_groups: int,
    per_position: bool = False,
) -> Tensor:
    """Return how far a sample's own statistics can be expected to move the output, relative to its variation.

    The statistics of a sample scatter around the running ones. Were all of a channel's variance ``v`` between samples
    and no two channels alike, a group of m channels with mean μ and variance σ² would have a mean with variance
    ``D = mean(v)/m`` and a variance with variance ``K = mean(2v² + 4v·(mean − μ)²)/m``. To first order the matched
    output ``a·x`` of a channel then moves by ``a²·(D + (v + (mean − μ)²)·K/(4·(σ² + norm_eps)²))`` in the mean square.
    The result is the root of that, summed over the channels, over the outputs' own variance ``a²·v``: 0 moves nothing,
    1 as much as the samples differ. What a channel says that GroupNorm takes for a constant moves as a whole. Positions
    inside a sample average out, so that real images move it less; layers and group counts compare all the same.

    Args as for `closed_form`; many norms at a time, (*, C) and epsilons (*,), give (*,).
    """
    dtype = weight.dtype
    weight, mean, var = (value.double().unflatten(-1, (num_groups, -1)) for value in (weight, mean, var))
    eps, norm_eps = (_by_norm(value, mean, axes=2) for value in (eps, norm_eps))
    size = mean.shape[-1]
    group_mean, group_var = group_moments(mean, var, per_position=per_position)
    distance = (mean - group_mean).square()
    mean_moves = var.mean(-1, keepdim=True) / size
    var_moves = (var * (var + 2 * distance)).mean(-1, keepdim=True) * (2 / size)
    gain = weight.square() / (var + eps)
    constant = is_constant(mean - group_mean, var, group_var, eps=eps, dtype=dtype)
    share = var_moves / (4 * (group_var + norm_eps).square().clamp_min(1e-300))
    moved = gain * torch.where(constant, var, mean_moves + (var + distance) * share)
    return (moved.sum((-2, -1)) / (gain * var).sum((-2, -1)).clamp_min(1e-300)).sqrt()


def scale_and_shift(
    weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, *, eps: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Return BatchNorm's eval function as a (C,) scale ``weight/√(var + eps)`` and shift ``bias − scale·mean``.

    Args as for `closed_form`.
    """
    var = var.double()
    scale = weight.double() / (var + _by_norm(eps, var, axes=1)).sqrt()
    return scale.to(weight.dtype), (bias.double() - scale * mean.double()).to(weight.dtype)


def standardized_statistics(rows: Tensor, bias: Tensor | None, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Return running statistics as they would be behind the filters that `centred` makes of these.

    Scaling filter c to the common standard deviation scales its output by the same; what removing the filter's mean
    does depends on the input and is left out. Of a constant filter nothing is left but the bias.

    Args:
        rows: Filters, shape (C, fan_in).
        bias: The convolution's bias, shape (C,), or None.
        mean: Running mean, shape (C,).
        var: Running variance, shape (C,).
    """
    std = rows.double().std(dim=1, correction=0)
    common = std.square().mean().sqrt()
    alive = std > 1e-12 * common
    scale = torch.where(alive, common / std, 0)
    shift = torch.zeros_like(std) if bias is None else bias.double()
    return (mean.double() - shift) * scale + shift, var.double() * scale.square()


def centred(rows: Tensor) -> Tensor:
    """Return filters (C, fan_in) of mean zero and one common standard deviation, the root mean square of theirs.

    Standardization sees no difference, and a plain convolution with these filters in front of a GroupNorm computes the
    same function, so a checkpoint that is loaded without normswap is not silently wrong. The layer keeps its scale,
    and with it the size of its optimizer steps relative to its weights.
    """
    off = rows.clone() if rows.dtype in (torch.float32, torch.float64) else rows.float()
    for _ in range(2):  # the second time takes off what the first one's rounding left
        off -= off.mean(1, keepdim=True)
    largest = torch.stack(torch.aminmax(off)).abs().amax()
    off /= torch.where(largest > 0, largest, 1)  # squares of very small and very large values leave float32's range
    std = torch.linalg.vector_norm(off, dim=1, keepdim=True) / rows.shape[1] ** 0.5
    common = largest * std.square().mean().sqrt()
    return off.mul_(torch.where(std > 0, common / std, largest)).to(rows.dtype)
