"""Plans that do not fit, and networks that carry none."""

import pytest
from nets import conv
from torch import nn

import normswap


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
