"""Equalization: the scales and signs of filters that BatchNorm does not see and with which GroupNorm moves least.

BatchNorm normalizes each channel by itself: a filter may be multiplied by any number ``s ≠ 0`` and its function stays
what it was (γ takes the sign, the running statistics the scale). GroupNorm takes mean and variance over all channels of
a group, so the choice decides how far a sample's own statistics move its output. Cross-layer equalization (Nagel et al.
2019, arXiv 1906.04721) uses the same freedom of scale for quantization.

Let ``y = (x − μ)/σ`` with the running mean, and the deviation with BatchNorm's epsilon, ``r = μ/σ`` and ``t = s·σ``: a
channel before GroupNorm is ``z = t·(y + r)``. A sample's group has mean m and variance v, the running statistics give
it M and V; ``ε = shrink·V``, averaged over the groups, and ``ρ = √((V + ε)/(v + ε))``. The matched GroupNorm less
BatchNorm is then, in channel c, ``γ/t·[(ρ − 1)·z − (ρ·m − M)]``. Its mean square over positions, summed over the
channels of a group, is

    (ρ − 1)²·A − 2·(ρ − 1)·o·B + o²·D,    o = ρ·m − M,
    A = Σ γ²·E[(y + r)²],    B = Σ γ²/t·E[y + r],    D = Σ γ²/t².

So it needs each sample's first and second moment per channel and nothing else, A does not depend on t at all, and all
the others are matrix-vector products with the moments.

What counts is not the norm's output but the network's. To first order an error e of the channels, the same at all
positions, moves the outputs by ``J·e``, and the shift by o is one: ``e = o·u`` with ``u = 1/t``. With K, an estimate of
``Jᵀ·J``, in the place of ``diag(γ²)``, ``D = uᵀ·K·u``, so that scales and signs let the shifts of a group's channels
cancel in the outputs, too. The squares of o and D are both quadratic forms in the signs, and signs make their product
small.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from normswap.layers.matching import CONSTANT, HEARD
from normswap.layers.standardization import filters, kernel

STEPS, RATE = 60, 0.15
"""Steps of Adam on log|t|, and its highest rate; it falls along a cosine."""

SCATTER = 0.2
"""Share of what channels' means scatter by themselves that counts as left however well they balance on the samples."""

BOUND = 0.7
"""Largest log|t|. Wider spreads keep a little more of the function and act as a higher learning rate afterwards."""


@dataclass(frozen=True)
class Moments:
    """What samples show of the inputs of B norms of one size, each a BatchNorm in eval mode.

    Attributes:
        first: (B, N, C) mean over a sample's positions of ``y = (x − mean)/deviation``.
        second: (B, N, C) mean square of the same.
        ratio: (B, C) running mean over deviation, r.
        live: (B, C) running variance over the deviation's square: 1 but for BatchNorm's epsilon.
        weight: (B, C) γ.
        slopes: (B, M, C) what scales are fitted for instead of γ: an error e of the channels counts
            ``|slopes·e|² + |apart·e|²``. M is 0 where nothing tells what channels are together.
        apart: (B, C).
    """

    first: Tensor
    second: Tensor
    ratio: Tensor
    live: Tensor
    weight: Tensor
    slopes: Tensor
    apart: Tensor

    def of_groups(self, num_groups: int, *, important: bool = False) -> "_Groups":
        """Return the same, group by group, weighted by γ, or by what the network's outputs make of the channels."""
        if important:
            return _Groups(self, self.slopes, self.apart, num_groups, scatter=SCATTER)
        return _Groups(self, self.slopes[:, :0], self.weight, num_groups, scatter=0)


class _Groups:
    """Moments of B·G groups of k channels, and the error of t on them; (B·G, N, k), (B·G, M, k) and (B·G, k, 1)."""

    def __init__(self, moments: Moments, slopes: Tensor, apart: Tensor, num_groups: int, *, scatter: float) -> None:
        self.norms, channels = moments.first.shape[0], moments.first.shape[-1]
        self.groups, self.size = num_groups, channels // num_groups
        ratio = moments.ratio[:, None]
        self.first = self._samples(moments.first + ratio)
        self.second = self._samples(moments.second + 2 * ratio * moments.first + ratio.square())
        self.centred = self._samples(moments.first - moments.first.mean(1, keepdim=True))
        self.scatter = scatter * self.centred.square().sum(1).unsqueeze(-1)
        self.ratio, self.live = self._channels(moments.ratio), self._channels(moments.live)
        self.slopes, self.apart = self._samples(slopes), self._channels(apart.square())
        power = slopes.square().sum(1) + apart.square()
        self.power = self._channels(power)
        self.spread = self.second @ self.power
        self.total = (power * moments.second.mean(1)).sum(1).clamp_min(1e-30)

    def _samples(self, values: Tensor) -> Tensor:
        split: Tensor = values.unflatten(-1, (self.groups, self.size))
        return split.transpose(1, 2).flatten(0, 1).contiguous()

    def _channels(self, values: Tensor) -> Tensor:
        return values.reshape(self.norms * self.groups, self.size, 1)

    def together(self, values: Tensor) -> Tensor:
        """Return (B·G, k, 1) values as (B, C)."""
        return values.reshape(self.norms, self.groups * self.size)

    def error(self, t: Tensor, shrink: float) -> Tensor:
        """Return the (B,) mean square error that the norms' outputs make, relative to what they make themselves."""
        return self._compared(t, shrink).error

    def slope(self, t: Tensor, shrink: float) -> tuple[Tensor, Tensor]:
        """Return the error, and its derivative by log|t|, (B·G, k, 1): autograd's, in half of its time."""
        own = self._compared(t, shrink)
        by_off = 2 * (own.off * own.inverse - (own.ratio - 1) * own.mixed)
        by_ratio = 2 * ((own.ratio - 1) * self.spread - own.off * own.mixed) + by_off * own.mean
        by_own_var = -by_ratio * own.ratio / (2 * own.below)
        by_var = (by_ratio * own.ratio / (2 * own.above)).sum(1, keepdim=True)
        by_eps = by_var + by_own_var.sum(1, keepdim=True)
        by_var = by_var + 1e-12 * by_eps + shrink / self.groups * self.by_group(self._of_norms(by_eps))
        by_mean = by_off * own.ratio - 2 * own.mean * by_own_var
        by_running = -by_off.sum(1, keepdim=True) - 2 * own.running * by_var
        by_first = self.first.transpose(1, 2) @ torch.cat([by_mean, -2 * (own.ratio - 1) * own.off], 2)
        by_second = self.second.transpose(1, 2) @ by_own_var + own.level * by_var
        slope = t * (by_first[..., :1] + self.ratio * by_running) + 2 * t.square() * by_second
        slope = slope / self.size - own.share * by_first[..., 1:]
        off = own.off.square().sum(1, keepdim=True) + own.scattered.sum(1, keepdim=True)
        by_inverse = self.slopes.transpose(1, 2) @ own.moved + self.apart / t
        slope = slope + 2 * own.inverse * own.scattered - 2 / t * by_inverse * off
        return own.error, slope / (self.first.shape[1] * self.by_group(self.total))

    def _compared(self, t: Tensor, shrink: float) -> "_Compared":
        mean, level = (t * self.ratio).mean(1, keepdim=True), self.live + self.ratio.square()
        var = (t.square() * level).mean(1, keepdim=True) - mean.square()
        share = self.power / t
        own_mean, mixed = (self.first @ torch.cat([t / self.size, share], 2)).split(1, 2)
        own_var = self.second @ t.square() / self.size - own_mean.square()
        eps = shrink * self.by_group(self._of_norms(var) / self.groups) + 1e-12 * var
        above, below = var + eps, (own_var.clamp_min(0) + eps).clamp_min(1e-30)
        ratio = (above / below).sqrt()
        off = ratio * own_mean - mean
        moved = self.slopes @ (1 / t)
        inverse = moved.square().sum(1, keepdim=True) + (self.apart / t.square()).sum(1, keepdim=True)
        errors = (ratio - 1).square() * self.spread - 2 * (ratio - 1) * off * mixed + off.square() * inverse
        scattered = self.scatter * (t / self.size).square()
        error = errors.sum(1, keepdim=True) + scattered.sum(1, keepdim=True) * inverse
        error = self._of_norms(error) / (self.first.shape[1] * self.total)
        statistics = mean, level, share, own_mean, mixed, above, below, ratio, off
        return _Compared(error, *statistics, scattered, moved, inverse)

    def balanced(self, t: Tensor, *, means_alone: bool = False) -> Tensor:
        """Return signs with which the groups' means scatter less than with those of t, and move the outputs less."""
        size = t.abs()
        means = SignedSum(self.centred * size.transpose(1, 2), (self.scatter * size.square()).sum(1, keepdim=True))
        if means_alone:
            return balanced([means], t.sign())
        moves = SignedSum(self.slopes / size.transpose(1, 2), (self.apart / size.square()).sum(1, keepdim=True))
        return balanced([means, moves], t.sign())

    def _of_norms(self, values: Tensor) -> Tensor:
        """Return the (B,) sums of (B·G, 1, 1) values over the groups of a norm."""
        return values.view(self.norms, self.groups).sum(1)

    def by_group(self, values: Tensor) -> Tensor:
        """Return (B,) values as (B·G, 1, 1)."""
        return values.repeat_interleave(self.groups).view(-1, 1, 1)


class _Compared(NamedTuple):
    """The statistics of samples beside the running ones, group by group, and the error that they make.

    Attributes:
        error: (B,).
        running: M, (B·G, 1, 1).
        level: (B·G, k, 1) mean square of each channel at t = 1.
        share: What each channel counts, over t, (B·G, k, 1).
        mean: m, (B·G, N, 1).
        mixed: B, (B·G, N, 1).
        above: V + ε, (B·G, 1, 1).
        below: v + ε, (B·G, N, 1).
        ratio: ρ, (B·G, N, 1).
        off: o, (B·G, N, 1).
        scattered: Part of each channel in the squares of the shifts that counts as left in any case, (B·G, k, 1).
        moved: What a shift of 1 does to the outputs, (B·G, M, 1).
        inverse: D, (B·G, 1, 1).
    """

    error: Tensor
    running: Tensor
    level: Tensor
    share: Tensor
    mean: Tensor
    mixed: Tensor
    above: Tensor
    below: Tensor
    ratio: Tensor
    off: Tensor
    scattered: Tensor
    moved: Tensor
    inverse: Tensor


def drift_of(moments: Moments, *, num_groups: int, shrink: float, t: Tensor | None = None) -> Tensor:
    """Return the (B,) drift that samples show: the root of the relative mean square error of the norms' outputs.

    Args:
        moments: Of B norms of one size.
        num_groups: Groups of C/num_groups neighbouring channels.
        shrink: As for `normswap.convert`.
        t: (B, C) scales and signs; 1 where there are none. Several, (*, B, C), give (*, B).
    """
    groups = moments.of_groups(num_groups)
    several = torch.ones_like(moments.ratio) if t is None else t
    errors = [groups.error(one.reshape(groups.ratio.shape), shrink) for one in several.view(-1, *moments.ratio.shape)]
    return torch.stack(errors).view(several.shape[:-1]).clamp_min(0).sqrt()


@torch.no_grad()
def equalize(
    moments: Moments, *, num_groups: int, shrink: float, bound: float = BOUND, steps: int = STEPS
) -> tuple[Tensor, Tensor]:
    """Return scale and sign of every channel, and the error that is left with them.

    Signs are flipped, the best one first, until none makes the group means of the samples scatter less; then until none
    makes the product smaller of that and of what the outputs make of it. Then log|t| is fitted by Adam; two fifths of
    the way and at the end the signs are looked at again, with the scales known. A fit of one or two steps looks at the
    outputs at its end alone. Nothing is random.

    Args:
        moments: Of B norms of one size.
        num_groups: Groups of C/num_groups neighbouring channels.
        shrink: As for `normswap.convert`.
        bound: Largest log|t|; 0 for signs alone.
        steps: Steps of Adam.

    Returns:
        t, (B, C), and the root of the relative error that was made small, (B,), never larger than with t = 1.
    """
    groups = moments.of_groups(num_groups, important=True)
    ones = torch.ones_like(groups.ratio)
    best, least = ones, groups.error(ones, shrink)
    if groups.size == 1:  # a channel by itself: no other that it could balance
        return groups.together(best), least.clamp_min(0).sqrt()

    def keep(t: Tensor, error: Tensor) -> None:
        nonlocal best, least
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(groups.by_group(better), t, best)

    sign = groups.balanced(alternating(groups.ratio), means_alone=True)
    parts = (steps * 2 // 5, steps - steps * 2 // 5) if bound > 0 else (0, 0)
    if parts[0] or not any(parts):
        sign = groups.balanced(sign)
    for part in filter(None, parts):
        descent = Descent(best.abs().log(), bound, part)
        for _ in range(part):
            t = sign * descent.value.exp()
            error, slope = groups.slope(t, shrink)
            keep(t, error)
            descent.step(slope / groups.by_group(error.clamp_min(1e-30)))
        t = sign * descent.value.exp()
        keep(t, groups.error(t, shrink))
        sign = groups.balanced(best)
    t = sign * best.abs()
    keep(t, groups.error(t, shrink))
    return groups.together(best), least.clamp_min(0).sqrt()


class Descent:
    """Steps of Adam on numbers that stay within a bound, as ``bound·tanh(x/bound)``; the rate falls along a cosine.

    Attributes:
        value: The numbers as they stand.
    """

    def __init__(self, start: Tensor, bound: float, steps: int) -> None:
        """Start from numbers, of which the largest are drawn a little away from the bound."""
        self._bound, self._steps, self._count = bound, steps, 0
        self._inner = (start / bound).clamp(-0.99, 0.99).atanh() * bound
        self._first, self._second = torch.zeros_like(start), torch.zeros_like(start)
        self.value = self._bent()

    def step(self, slope: Tensor) -> None:
        """Go one step down a slope."""
        slope = slope * (1 - (self.value / self._bound).square())
        self._first = 0.9 * self._first + 0.1 * slope
        self._second = 0.99 * self._second + 0.01 * slope.square()
        rate = RATE * (1 + math.cos(math.pi * self._count / self._steps)) / 2
        self._count += 1
        first, second = self._first / (1 - 0.9**self._count), self._second / (1 - 0.99**self._count)
        self._inner = self._inner - rate * first / (second.sqrt() + 1e-12)
        self.value = self._bent()

    def _bent(self) -> Tensor:
        return self._bound * torch.tanh(self._inner / self._bound)


def alternating(like: Tensor) -> Tensor:
    """Return (…, k, 1) signs +1, −1, +1, …"""
    signs = torch.ones_like(like)
    signs[..., 1::2, :] = -1
    return signs


class SignedSum:
    """The squares of the sums of some channels' values, each with a sign, and what flipping one would make of them."""

    def __init__(self, values: Tensor, rest: Tensor | float = 0.0) -> None:
        """Keep values of channels.

        Args:
            values: (groups, N, k); for each of N samples a value per channel.
            rest: (groups, 1, 1) what the squares have beside them.
        """
        self._values, self._across = values, values.transpose(1, 2)
        power = values.square().sum(1).unsqueeze(-1)
        self._power, self._rest = 4 * power, rest
        self._least = 1e-9 * (power.sum(1, keepdim=True) + rest).clamp_min(1e-30)
        self._products = self._across @ values if values.shape[2] <= 2 * values.shape[1] else None  # else they are more

    def start(self, signs: Tensor) -> None:
        """Take signs, (groups, k, 1)."""
        self._pull = self._across @ (self._values @ signs)

    def flipped(self, signs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the squares as they stand, (groups, 1, 1), and with each sign flipped, (groups, k, 1)."""
        pulled = signs * self._pull
        total = pulled.sum(1, keepdim=True) + self._rest
        return total.maximum(self._least), torch.sub(total + self._power, pulled, alpha=4).maximum(self._least)

    def change(self, rows: Tensor, at: Tensor, by: Tensor) -> None:
        """Take other signs of a channel of each group."""
        if self._products is not None:
            column = self._products[rows, at].unsqueeze(-1)
        else:
            column = self._across @ self._values[rows, :, at].unsqueeze(-1)
        self._pull = self._pull + by.view(-1, 1, 1) * column


def balanced(sums: Sequence[SignedSum], signs: Tensor) -> Tensor:
    """Flip signs, the best one of each group first, until none makes the product of squares of signed sums smaller.

    Args:
        sums: Of (groups, *, k) values.
        signs: (groups, k, 1) to start from.
    """
    signs, rows = signs.clone(), torch.arange(len(signs), device=signs.device)
    for own in sums:
        own.start(signs)
    for _ in range(4 * signs.shape[1]):
        totals, flipped = zip(*(own.flipped(signs) for own in sums), strict=True)
        share, at = reduce(torch.mul, (after / before for before, after in zip(totals, flipped, strict=True))).min(1)
        share, at = share.squeeze(1), at.squeeze(1)
        helps = share < 1 - 1e-6
        if not helps.any():
            break
        change = torch.where(helps, -2 * signs[rows, at, 0], 0.0)
        signs[rows, at, 0] += change
        for own in sums:
            own.change(rows, at, change)
    return signs


def rescaled(
    weight: Tensor, mean: Tensor, var: Tensor, scale: Tensor, *, eps: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the γ, mean and variance of the BatchNorm that does behind scaled filters what it did before.

    ``γ·(x − μ)/√(σ² + ε)`` is ``γ'·(s·x − s·μ)/√(s²σ² + ε)`` with ``γ' = γ·√(s²σ² + ε)/(s·√(σ² + ε))``.

    Args:
        weight: γ, (C,).
        mean: Running mean, (C,).
        var: Running variance, (C,).
        scale: s, (C,), not 0.
        eps: BatchNorm's epsilon.
    """
    scaled = var * scale.square()
    return weight * ((scaled + eps) / (var + eps)).sqrt() / scale, mean * scale, scaled


def times(parameter: Tensor, scale: Sequence[float], *, transposed: bool = False, groups: int = 1) -> Tensor:
    """Return the filters of a weight, or the values of a bias, times their factors.

    Args:
        parameter: A convolution's or a linear layer's weight, or its bias, (C,).
        scale: C factors.
        transposed: Whether the weight is a transposed convolution's.
        groups: Groups of that.
    """
    factors = parameter.new_tensor(scale)
    if parameter.ndim == 1:
        return parameter.detach() * factors
    rows = filters(parameter.detach(), transposed=transposed, groups=groups)
    return kernel(rows * factors.unsqueeze(-1), parameter, transposed=transposed, groups=groups)


def deviation(mean: Tensor, var: Tensor, *, eps: float | Tensor) -> Tensor:
    """Return the (*, C) unit in which channels are compared: √(var + eps); with the mean in it where nothing varies.

    Args:
        mean: Running mean.
        var: Running variance.
        eps: BatchNorm's epsilon.
    """
    dead = (var <= CONSTANT * var.mean(-1, keepdim=True)) & (var <= HEARD * eps)
    return (var + eps + torch.where(dead, mean.square(), 0)).sqrt()
