"""Epsilon, group count and drift of a norm, from the statistics of the one it replaces."""

from typing import Any

import pytest
import torch
from torch import nn

import normswap
from normswap.layers.matching import closed_form, damping, drift


def trained(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    """Give a norm statistics and an affine part that differ by channel."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor, low in ((norm.weight, 0.5), (norm.bias, -1.0), (norm.running_mean, -2.0), (norm.running_var, 0.1)):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 2 + low)  # type: ignore[union-attr]
    return norm.eval()


def test_shrink_sets_the_epsilon_and_zero_keeps_it() -> None:
    norm = trained(nn.BatchNorm2d(16, eps=1e-3))
    x = torch.zeros(2, 16, 8, 8)
    mean, var = norm.running_mean, norm.running_var
    assert mean is not None
    assert var is not None
    assert normswap.convert(norm, groups=1, shrink=0, example_input=x).eps == 1e-3
    whole = float(var.mean() + mean.var(correction=0))
    assert normswap.convert(norm, groups=1, shrink=2, example_input=x).eps == pytest.approx(1e-3 + 2 * whole)
    assert normswap.convert(norm, groups=1, example_input=x).eps == pytest.approx(1e-3 + 0.5 * whole)
    assert normswap.convert(norm, groups="auto", example_input=x).eps == pytest.approx(1e-3 + 1.5 * whole)
    assert normswap.convert(norm, groups=1, affine="copy", example_input=x).eps == 1e-3
    assert normswap.convert(nn.BatchNorm2d(16), groups=1, example_input=x).eps == 1e-5  # fresh: nothing to draw to


def test_auto_keeps_a_loud_half_away_from_a_quiet_one() -> None:
    norm = trained(nn.BatchNorm2d(32))
    with torch.no_grad():
        norm.weight.fill_(1)
        norm.running_mean.zero_()  # type: ignore[union-attr]
        norm.running_var[:16], norm.running_var[16:] = 1e-4, 1e2  # type: ignore[index]
    x = torch.zeros(2, 32, 8, 8)
    assert normswap.inspect(norm, groups="auto", example_input=x).norms[0].groups == 2
    norm.running_var.fill_(1)  # type: ignore[union-attr]
    assert normswap.inspect(norm, groups="auto", example_input=x).norms[0].groups == 1
    assert (
        normswap.inspect(nn.BatchNorm2d(96), groups="auto", example_input=torch.zeros(2, 96, 8, 8)).norms[0].groups
        == 32
    )


def test_fresh_norms_keep_their_affine_part() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    plan = normswap.inspect(model)
    assert plan.norms[0].affine == "copy"
    assert plan.convs[0].ws == "standard"
    trained(model[1])
    plan = normswap.inspect(model)
    assert plan.norms[0].affine == "match"
    assert plan.convs[0].ws == "adaptive"


def test_no_gradient_reaches_a_plan() -> None:
    conv, norm = nn.Conv2d(3, 16, 3), trained(nn.BatchNorm2d(16))
    plan = normswap.inspect(nn.Sequential(conv, norm), ws="standard")
    assert isinstance(plan.norms[0].eps, float)
    result = normswap.apply(nn.Sequential(conv, norm), plan)
    assert all(p.is_leaf and p.grad_fn is None for p in result.parameters())


def drawn_norms() -> list[torch.Tensor]:
    """Weight, bias, mean and variance of three norms of eight channels."""
    shape = (3, 8)
    return [torch.randn(shape), torch.randn(shape), torch.randn(shape), torch.rand(shape) + 0.1]


@pytest.mark.parametrize("unit", [1e-7, 1e7], ids=["small", "large"])
def test_the_unit_of_the_activations_does_not_matter(unit: float) -> None:
    weight, bias, mean, var = (value.double() for value in drawn_norms())
    shrink = damping(mean, var, shrink=1, num_groups=2)
    options: dict[str, Any] = {"eps": 0, "num_groups": 2}
    expected = closed_form(weight, bias, mean, var, norm_eps=shrink, **options)
    found = closed_form(weight, bias, mean * unit, var * unit**2, norm_eps=shrink * unit**2, **options)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        drift(weight, mean * unit, var * unit**2, norm_eps=shrink * unit**2, **options),
        drift(weight, mean, var, norm_eps=shrink, **options),
    )


def test_groups_of_different_spread_drift_on_their_own() -> None:
    """Two groups that are alike drift as one of them does; a louder one beside it does not change that."""
    weight, mean, var = torch.ones(4), torch.tensor([0.0, 2, 0, 2]), torch.tensor([1.0, 3, 1, 3])
    one = drift(weight[:2], mean[:2], var[:2], eps=0, norm_eps=0, num_groups=1)
    louder = torch.tensor([1.0, 1, 10, 10])
    both = drift(weight, mean * louder, var * louder**2, eps=0, norm_eps=0, num_groups=2)
    assert both.item() == pytest.approx(one.item())
