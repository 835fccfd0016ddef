"""Scales and signs of filters that several norms read, or that stand beside channels whose filters stay.

The error is that of `normswap.layers.equalization`, summed over the norms; a scale is one number in all of them, and a
channel whose filter stays keeps ``t = σ``, which s = 1 gives.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from normswap.layers.equalization import BOUND, STEPS, Descent, Moments, alternating

FIXED = -1
"""Index of channels whose filters stay."""


@dataclass(frozen=True)
class Reader:
    """One of the norms.

    Attributes:
        moments: Of this norm alone.
        unit: (C,) deviation of its channels.
        index: (C,) which of the scales each channel has, or FIXED.
        num_groups: Groups of neighbouring channels.
        shrink: As for `normswap.convert`.
    """

    moments: Moments
    unit: Tensor
    index: Tensor
    num_groups: int
    shrink: float

    def of_channels(self, scales: Tensor) -> Tensor:
        """Return the (C,) scale of every channel, of (count,) scales; 1 where the filter stays."""
        return torch.cat([scales, scales.new_ones(1)])[self.index]

    def t(self, scales: Tensor) -> Tensor:
        """Return (1, C) t = s·σ of (count,) scales."""
        return (self.unit * self.of_channels(scales)).unsqueeze(0)


@torch.no_grad()
def equalize_jointly(readers: Sequence[Reader], count: int, *, bound: float = BOUND, steps: int = STEPS) -> Tensor:
    """Return (count,) scales, not 0, with which the norms' errors are together no larger than with s = 1.

    As in `equalize`: signs are flipped first, then log|s| is fitted, with another look at the signs on the way. They
    make the sum small of how far means scatter and how far they move the outputs, each in units of what the channels
    would do by themselves.

    Args:
        readers: The norms.
        count: Number of scales.
        bound: Largest distance of log|t| from that of the channels around.
        steps: Steps of Adam.
    """
    groups = [reader.moments.of_groups(reader.num_groups, important=True) for reader in readers]
    places = [torch.where(reader.index < 0, count, reader.index) for reader in readers]

    def total(scales: Tensor) -> Tensor:
        errors = [
            own.error(reader.t(scales).reshape(own.ratio.shape), reader.shrink).sum()
            for reader, own in zip(readers, groups, strict=True)
        ]
        return torch.stack(errors).sum()

    def slope(scales: Tensor) -> tuple[Tensor, Tensor]:
        """Return the error, and the derivative of its logarithm by log|s|."""
        error, slopes = scales.new_zeros(()), scales.new_zeros(count + 1)
        for reader, own, at in zip(readers, groups, places, strict=True):
            error_of_one, slope_of_one = own.slope(reader.t(scales).reshape(own.ratio.shape), reader.shrink)
            error = error + error_of_one.sum()
            slopes.index_add_(0, at, slope_of_one.flatten())
        return error, slopes[:-1] / error.clamp_min(1e-30)

    def balanced_signs(scales: Tensor) -> Tensor:
        gram = scales.new_zeros(count + 1, count + 1)
        for reader, own, at in zip(readers, groups, places, strict=True):
            size = reader.t(scales.abs()).reshape(own.ratio.shape).transpose(1, 2)
            at = at.view(own.groups, own.size)
            for values, apart in ((own.centred * size, 0.0), (own.slopes / size, own.apart.transpose(1, 2) / size**2)):
                products = values.transpose(1, 2) @ values
                alone = products.diagonal(dim1=1, dim2=2).sum() + torch.as_tensor(apart).sum()
                gram.index_put_((at.unsqueeze(2), at.unsqueeze(1)), products / alone.clamp_min(1e-30), accumulate=True)
        return _flipped(gram, torch.cat([scales.sign(), scales.new_ones(1)]))[:-1]

    best = readers[0].unit.new_ones(count)
    least, centre = total(best), _centre(readers, count)

    def keep(scales: Tensor, error: Tensor) -> None:
        nonlocal best, least
        if bool(error < least):
            best, least = scales, error

    sign = balanced_signs(alternating(centre.unsqueeze(-1)).squeeze(-1) * centre.exp())
    start = torch.zeros_like(centre)
    for part in (steps * 2 // 5, steps - steps * 2 // 5):
        descent = Descent(start, bound, part)
        for _ in range(part):
            scales = sign * (centre + descent.value).exp()
            error, down = slope(scales)
            keep(scales, error)
            descent.step(down)
        scales = sign * (centre + descent.value).exp()
        keep(scales, total(scales))
        sign = balanced_signs(best)
        keep(sign * best.abs(), total(sign * best.abs()))
        start = best.abs().log() - centre
    return best


def _centre(readers: Sequence[Reader], count: int) -> Tensor:
    """Return (count,) log s with which all channels have the t of the fixed ones, or filters keep their size."""
    unit = readers[0].unit
    sums, number = unit.new_zeros(count + 1), unit.new_zeros(count + 1)
    for reader in readers:
        at = torch.where(reader.index < 0, count, reader.index)
        sums.index_add_(0, at, reader.unit.log())
        number.index_add_(0, at, torch.ones_like(reader.unit))
    means = sums / number.clamp_min(1)
    return (means[-1] if bool(number[-1]) else means[:-1].mean()) - means[:-1]


def _flipped(gram: Tensor, signs: Tensor) -> Tensor:
    """Flip signs, the best one first, until none makes ``signsᵀ·gram·signs`` smaller; the last one stays."""
    power, pull = gram.diagonal().clone(), gram @ signs
    least = 1e-9 * float(power.sum())
    for _ in range(4 * len(signs)):
        gain, at = (signs * pull - power)[:-1].max(0)
        if float(gain) <= least:
            break
        pull -= 2 * signs[at] * gram[:, at]
        signs[at] = -signs[at]
    return signs
