"""Plans that do not fit, and networks that carry none."""

from dataclasses import replace
from typing import Any

import broken
import pytest
import torch
from nets import conv
from torch import nn

import normswap
from normswap.planning.choices import Action


def small() -> nn.Sequential:
    return nn.Sequential(conv(3, 16), nn.BatchNorm2d(16, eps=1e-3), nn.ReLU(), conv(16, 16), nn.BatchNorm2d(16))


def test_plan_for_another_network_is_refused() -> None:
    plan = normswap.inspect(small())
    with pytest.raises(
        normswap.PlanMismatch, match="^0: the plan was made for a Conv2d of 16 channels, found Conv2d of 8"
    ):
        normswap.apply(nn.Sequential(conv(3, 8), nn.BatchNorm2d(8)), plan)
    with pytest.raises(normswap.PlanMismatch, match="^0: the plan names it, Linear has no such layer"):
        normswap.apply(nn.Linear(3, 3), plan)


def test_plan_of_a_stranger() -> None:
    with pytest.raises(normswap.PlanMismatch, match="Linear carries no plan; pass the model that"):
        normswap.plan_of(nn.Linear(3, 3))


FLAWS = {
    "norm without epsilon": ("bn1", {"eps": None}, "'group_norm' without an epsilon"),
    "conv without epsilon": ("conv1", {"eps": None}, "'standardize' without an epsilon"),
    "norm without groups": ("bn1", {"groups": None}, "'group_norm' with None groups"),
    "groups that do not divide": ("bn1", {"groups": 3}, "3 groups do not divide 8 channels"),
    "groups of one value": ("bn1", {"groups": 8, "shape": (2, 8, 1, 1)}, "8 groups of one value each"),
    "conv without a form": ("conv1", {"ws": None}, "'standardize' with the form None"),
    "norm that is standardized": ("bn1", {"action": Action.STANDARDIZE}, "'standardize' is for conv"),
    "conv that is grouped": ("conv1", {"action": Action.GROUP_NORM}, "'group_norm' is for norms"),
    "no channels": ("conv1", {"channels": 0}, "'standardize' of no channels"),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("layer", "changed", "message"), FLAWS.values(), ids=FLAWS)
def test_a_plan_that_cannot_be_carried_out_is_refused(
    layer: str, changed: dict[str, Any], message: str, inplace: bool
) -> None:
    model = broken.Net()
    plan, before = normswap.inspect(model, example_input=broken.X), repr(model)
    entries = {entry.name: replace(entry, **changed) for entry in plan.entries if entry.name == layer}
    with pytest.raises(
        normswap.PlanMismatch,
        match=rf"^{layer}: the plan cannot be carried out \({message}.*\); make one with normswap.inspect",
    ):
        normswap.apply(model, plan.with_entries(entries), inplace=inplace)
    assert repr(model) == before


TOO_LARGE = {
    "conv in float32": ("conv1", torch.float32, 1e39),
    "norm in float32": ("bn1", torch.float32, 1e308),
    "conv in float16": ("conv1", torch.float16, 1e10),
    "norm in float16": ("bn1", torch.float16, 1e10),
}


@pytest.mark.parametrize(("layer", "dtype", "eps"), TOO_LARGE.values(), ids=TOO_LARGE)
def test_an_epsilon_that_a_layer_cannot_hold_is_refused(layer: str, dtype: torch.dtype, eps: float) -> None:
    """Gains and γ carry its root, which made them infinite, and outputs NaN."""
    model = broken.Net().to(dtype)
    plan = normswap.inspect(model, example_input=broken.X.to(dtype))
    entries = {entry.name: replace(entry, eps=eps) for entry in plan.entries if entry.name == layer}
    with pytest.raises(normswap.PlanMismatch, match=rf"^{layer}: an epsilon of .* is too large for float"):
        normswap.apply(model, plan.with_entries(entries))


def test_a_large_epsilon_that_a_type_holds_keeps_the_kernel() -> None:
    model = broken.Net()
    plan = normswap.inspect(model, example_input=broken.X)
    entries = {entry.name: replace(entry, eps=1e30) for entry in plan.convs if entry.changes}
    torch.testing.assert_close(
        normswap.fold(normswap.apply(model, plan.with_entries(entries))).conv1.weight,
        normswap.fold(normswap.apply(model, plan)).conv1.weight,
    )


def test_shrink_beyond_what_the_norms_can_hold() -> None:
    model = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8)).eval()
    model[1].running_var.fill_(2)  # type: ignore[union-attr, operator]
    with pytest.raises(normswap.PlanMismatch, match=r"^1: an epsilon of .* too large for float32; .* smaller shrink="):
        normswap.convert(model, shrink=1e300, example_input=torch.zeros(2, 3, 8, 8))


def test_affine_values_that_overflow_are_refused() -> None:
    model = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8)).half().eval()
    model[1].running_mean[0], model[1].running_mean[1] = 6e4, -6e4  # type: ignore[index]
    model[1].weight.data.fill_(9)  # type: ignore[union-attr, operator]
    with pytest.raises(normswap.BadStatistics, match=r"^1: its γ or β would overflow in float16; convert .* float32"):
        normswap.convert(model, example_input=torch.zeros(2, 3, 8, 8).half())
