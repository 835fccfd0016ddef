"""Plans that do not fit, and networks that carry none."""

from dataclasses import replace
from typing import Any

import broken
import pytest
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
