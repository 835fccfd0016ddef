"""Scales and signs as tensor maths, against GroupNorm itself on samples with the moments."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from normswap.layers.equalization import (
    BOUND,
    Moments,
    SignedSum,
    alternating,
    balanced,
    deviation,
    drift_of,
    equalize,
    rescaled,
)
from normswap.layers.matching import closed_form, damping

SHRINK = 1.5


def samples(channels: int = 8, number: int = 24) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (N, C, H, W) inputs whose channels share much of what varies, and γ, mean and variance of a BatchNorm."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(number, 1, 1, 1, generator=generator).double()
    own = torch.randn(number, channels, 5, 5, generator=generator).double()
    size = torch.rand(1, channels, 1, 1, generator=generator).double() + 0.5
    x = size * (own * (1 + 0.5 * shared.abs()) + 2 * shared) + torch.randn(1, channels, 1, 1, generator=generator)
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    return x, torch.randn(channels, generator=generator).double(), mean, var


def moments(x: Tensor, weight: Tensor, mean: Tensor, var: Tensor) -> Moments:
    unit = var.sqrt()
    y = (x - mean.view(1, -1, 1, 1)) / unit.view(1, -1, 1, 1)
    ones = torch.ones_like(mean)
    both = y.mean((2, 3))[None], y.square().mean((2, 3))[None]
    none = weight.new_empty(1, 0, len(weight))
    return Moments(*both, (mean / unit)[None], ones[None], weight[None], none, weight[None])


def heard(seen: Moments, number: int = 5) -> Moments:
    """Return the same with outputs that read the channels together."""
    generator = torch.Generator().manual_seed(3)
    slopes = torch.randn(len(seen.first), number, seen.first.shape[-1], generator=generator).double()
    return replace(seen, slopes=slopes, apart=0.1 * seen.weight)


def drift_shown(x: Tensor, weight: Tensor, mean: Tensor, var: Tensor, scale: Tensor, num_groups: int) -> float:
    """Return how far GroupNorm of the scaled input is from BatchNorm of the plain one, matched in closed form."""
    scaled_weight, scaled_mean, scaled_var = rescaled(weight, mean, var, scale, eps=0.0)
    eps = float(damping(scaled_mean, scaled_var, shrink=SHRINK, num_groups=num_groups))
    affine = closed_form(scaled_weight, 0 * mean, scaled_mean, scaled_var, eps=0.0, norm_eps=eps, num_groups=num_groups)
    ours = F.group_norm(x * scale.view(1, -1, 1, 1), num_groups, *affine, eps)
    exact = F.batch_norm(x, mean, var, weight, eps=0.0)
    return float(((ours - exact).square().sum() / exact.square().sum()).sqrt())


@pytest.mark.parametrize("num_groups", [1, 2, 4])
def test_the_drift_is_what_group_norm_shows(num_groups: int) -> None:
    x, *norm = samples()
    ones = torch.ones(8).double()
    seen = drift_of(moments(x, *norm), num_groups=num_groups, shrink=SHRINK)
    # without scales the channels stand in units of their deviations
    assert float(seen) == pytest.approx(drift_shown(x, *norm, ones / norm[2].sqrt(), num_groups), rel=1e-6)
    t, _ = equalize(moments(x, *norm), num_groups=num_groups, shrink=SHRINK)
    left = drift_of(moments(x, *norm), num_groups=num_groups, shrink=SHRINK, t=t)
    assert float(left) == pytest.approx(drift_shown(x, *norm, t[0] / norm[2].sqrt(), num_groups), rel=1e-6)


@pytest.mark.parametrize("num_groups", [1, 2])
def test_equalization_helps_and_stays_within_its_bound(num_groups: int) -> None:
    x, *norm = samples()
    before = float(drift_of(moments(x, *norm), num_groups=num_groups, shrink=SHRINK))
    signs, by_signs = equalize(moments(x, *norm), num_groups=num_groups, shrink=SHRINK, bound=0)
    t, left = equalize(moments(x, *norm), num_groups=num_groups, shrink=SHRINK)
    assert set(signs.abs().unique().tolist()) == {1.0}
    assert float(left) < float(by_signs) < 0.7 * before
    assert float(t.abs().log().abs().max()) <= BOUND + 1e-9
    again, _ = equalize(moments(x, *norm), num_groups=num_groups, shrink=SHRINK)
    assert torch.equal(again, t)


def test_norms_together_are_as_each_alone() -> None:
    x, *norm = samples()
    one = moments(x, *norm)
    other = moments(x.flip(0) * 2, norm[0].flip(0), norm[1] * 2, norm[2] * 4)
    both = Moments(*(torch.cat([getattr(one, k), getattr(other, k)]) for k in vars(one)))
    together, drifts = equalize(both, num_groups=2, shrink=SHRINK)
    for index, alone in enumerate((one, other)):
        t, drift = equalize(alone, num_groups=2, shrink=SHRINK)
        torch.testing.assert_close(together[index], t[0])
        torch.testing.assert_close(drifts[index], drift[0])


def test_a_channel_by_itself_has_no_freedom() -> None:
    x, *norm = samples()
    t, _ = equalize(moments(x, *norm), num_groups=8, shrink=SHRINK)
    assert torch.equal(t, torch.ones(1, 8).double())


def test_signs_by_hand() -> None:
    values = torch.tensor([[[3.0, 1.0, 2.0, 2.0]]])
    signs = balanced([SignedSum(values)], torch.ones(1, 4, 1))
    assert float((values @ signs).abs()) == 0
    assert alternating(torch.zeros(2, 3, 1)).squeeze(-1).tolist() == [[1, -1, 1], [1, -1, 1]]


@pytest.mark.parametrize("number", [3, 40], ids=["few samples", "many samples"])
def test_signs_are_flipped_the_best_one_first(number: int) -> None:
    generator = torch.Generator().manual_seed(1)
    values, others = (torch.randn(2, number, 12, generator=generator).double() for _ in range(2))
    expected = torch.ones(2, 12, 1).double()
    for group, other, signs in zip(values, others, expected, strict=True):

        def left(signs: Tensor, group: Tensor = group, other: Tensor = other) -> float:
            return float((group @ signs).square().sum() * ((other @ signs).square().sum() + 2))

        while True:
            tries = [left(torch.cat([signs[:c], -signs[c : c + 1], signs[c + 1 :]])) for c in range(12)]
            if min(tries) >= left(signs):
                break
            signs[tries.index(min(tries))] *= -1
    assert (expected < 0).any()
    sums = [SignedSum(values), SignedSum(others, torch.full((2, 1, 1), 2.0).double())]
    assert torch.equal(balanced(sums, torch.ones(2, 12, 1).double()), expected)


@pytest.mark.parametrize("important", [False, True])
@pytest.mark.parametrize("num_groups", [1, 4])
def test_the_slope_is_the_one_of_autograd(num_groups: int, *, important: bool) -> None:
    x, *norm = samples()
    groups = heard(moments(x, *norm)).of_groups(num_groups, important=important)
    start = torch.randn(groups.ratio.shape, generator=torch.Generator().manual_seed(2)).double() / 3
    logs = start.requires_grad_()
    error = groups.error(alternating(logs) * logs.exp(), SHRINK)
    (expected,) = torch.autograd.grad(error.sum(), logs)
    found, slope = groups.slope((alternating(logs) * logs.exp()).detach(), SHRINK)
    torch.testing.assert_close(found, error.detach())
    torch.testing.assert_close(slope, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bound", [0, BOUND])
@pytest.mark.parametrize("num_groups", [1, 2])
def test_shifts_cancel_in_what_the_outputs_make_of_them(num_groups: int, bound: float) -> None:
    x, *norm = samples(channels=32)
    seen = heard(moments(x, *norm))

    def moved(t: Tensor) -> float:
        """Return the square of what outputs make of the difference of GroupNorm and BatchNorm."""
        scale = t[0] / norm[2].sqrt()
        scaled = rescaled(norm[0], *norm[1:], scale, eps=0.0)
        eps = float(damping(*scaled[1:], shrink=60.0, num_groups=num_groups))
        affine = closed_form(scaled[0], 0 * norm[1], *scaled[1:], eps=0.0, norm_eps=eps, num_groups=num_groups)
        off = F.group_norm(x * scale.view(1, -1, 1, 1), num_groups, *affine, eps)
        off = (off - F.batch_norm(x, *norm[1:], norm[0], eps=0.0)).mean((2, 3)) / norm[0]  # in units of y
        return float((off @ seen.slopes[0].mT).square().sum())

    fits = (equalize(one, num_groups=num_groups, shrink=60.0, bound=bound)[0] for one in (seen, moments(x, *norm)))
    together, by_gamma = map(moved, fits)
    assert together < (0.5 if bound else 0.75) * by_gamma
    assert by_gamma < moved(torch.ones(1, 32).double())


@pytest.mark.parametrize("eps", [0.0, 1e-3])
def test_batch_norm_does_not_see_a_scale(eps: float) -> None:
    x, weight, mean, var = samples()
    scale = torch.tensor([1.0, -2.0, 0.5, -0.25, 3.0, 1.0, -1.0, 8.0]).double()
    other = rescaled(weight, mean, var, scale, eps=eps)
    ours = F.batch_norm(x * scale.view(1, -1, 1, 1), *other[1:], other[0], eps=eps)
    torch.testing.assert_close(ours, F.batch_norm(x, mean, var, weight, eps=eps), rtol=1e-10, atol=1e-10)


def test_the_unit_of_a_constant_channel_holds_its_mean() -> None:
    unit = deviation(torch.tensor([3.0, 3.0]), torch.tensor([0.0, 4.0]), eps=1e-9)
    assert unit.tolist() == pytest.approx([3.0, 2.0])
    assert math.isfinite(float(unit.log().sum()))
