"""Scales that norms share, against GroupNorm's own drift."""

from dataclasses import replace

import pytest
import torch

from normswap.layers.equalization import Moments, drift_of, equalize
from normswap.layers.joint_equalization import FIXED, Reader, equalize_jointly

SHRINK = 1.5


def reader(index: list[int], *, num_groups: int = 1, seed: int = 0) -> Reader:
    """Return a norm whose channels share much of what varies from sample to sample."""
    generator = torch.Generator().manual_seed(seed)
    count = len(index)
    shared = torch.randn(24, 1, 1, generator=generator).double()
    y = torch.randn(24, count, 25, generator=generator).double() * (1 + 0.5 * shared.abs()) + 2 * shared
    y = (y - y.mean((0, 2), keepdim=True)) / y.std((0, 2), correction=0, keepdim=True)
    unit, ratio, weight = (torch.rand(count, generator=generator).double() + 0.5 for _ in range(3))
    ones = torch.ones(1, count).double()
    none = weight.new_empty(1, 0, count)
    moments = Moments(y.mean(2)[None], y.square().mean(2)[None], ratio[None], ones, weight[None], none, weight[None])
    return Reader(moments, unit, torch.tensor(index), num_groups, SHRINK)


def drift(one: Reader, scales: torch.Tensor) -> float:
    return float(drift_of(one.moments, num_groups=one.num_groups, shrink=SHRINK, t=one.t(scales)))


SHARED = {
    "all free": ([[0, 1, 2, 3, 4, 5, 6, 7]], 8, 1),
    "some stay": ([[0, 1, 2, FIXED, FIXED, 3, 4, 5]], 6, 1),
    "two norms": ([[0, 1, 2, 3, 4, 5], [FIXED, FIXED, 0, 1, 2, 3, 4, 5]], 6, 2),
    "one layer twice": ([[0, 1, 2, 3, 0, 1, 2, 3]], 4, 1),
    "other groups": ([[0, 1, 2, 3, FIXED, FIXED], [3, 2, 1, 0]], 4, 2),
}


@pytest.mark.parametrize(("indices", "count", "groups"), SHARED.values(), ids=SHARED)
def test_the_norms_drift_less_together(indices: list[list[int]], count: int, groups: int) -> None:
    readers = [reader(index, num_groups=groups, seed=seed) for seed, index in enumerate(indices)]
    scales, ones = equalize_jointly(readers, count), torch.ones(count).double()
    before, after = (sum(drift(one, s) ** 2 for one in readers) for s in (ones, scales))
    assert after < 0.8 * before
    assert scales.shape == (count,)
    assert bool((scales != 0).all())
    assert torch.equal(scales, equalize_jointly(readers, count))


def test_shifts_cancel_in_what_the_outputs_make_of_them() -> None:
    index, generator = list(range(48)), torch.Generator().manual_seed(5)
    plain = [reader(index, seed=seed) for seed in (0, 1)]
    slopes = [torch.randn(1, 6, 48, generator=generator).double() for _ in plain]
    heard = [
        replace(one, moments=replace(one.moments, slopes=own, apart=0.1 * one.moments.weight))
        for one, own in zip(plain, slopes, strict=True)
    ]

    def moved(scales: torch.Tensor) -> float:
        """Return how far a shift of 1 in each norm moves the outputs, in the mean square."""
        return sum(
            float((own[0] / one.t(scales)).sum(1).square().sum()) for one, own in zip(plain, slopes, strict=True)
        )

    assert moved(equalize_jointly(heard, 48)) < 0.05 * moved(equalize_jointly(plain, 48))


def test_a_norm_by_itself_gets_what_it_gets_alone() -> None:
    one = reader(list(range(8)))
    alone, _ = equalize(one.moments, num_groups=1, shrink=SHRINK)
    drifted = float(drift_of(one.moments, num_groups=1, shrink=SHRINK, t=alone))
    assert drift(one, equalize_jointly([one], 8)) == pytest.approx(drifted, rel=0.05)
