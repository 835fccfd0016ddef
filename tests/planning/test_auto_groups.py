"""Automatic group counts of norms that have nothing to choose by, or nothing that tells one count from another."""

import pytest
import torch
from torch import nn

import normswap

X = torch.randn(2, 3, 16, 16)


def net(*, runs: int, silent: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.BatchNorm2d(64))
    for _ in range(runs):
        model(torch.randn(8, 3, 16, 16))
    if silent:
        nn.init.zeros_(model[4].weight)  # type: ignore[arg-type]
    return model


@pytest.mark.parametrize("silent", [False, True], ids=["γ of one", "γ of zero"])
def test_a_fresh_norm_gets_the_usual_count_and_the_plan_says_so(silent: bool) -> None:
    plan = normswap.inspect(net(runs=0, silent=silent), example_input=X, groups="auto")
    assert [entry.groups for entry in plan.norms] == [32, 32]
    assert all("no statistics tell a group count: as for 32" in entry.reason for entry in plan.norms)
    assert "no statistics tell" not in normswap.inspect(net(runs=0), example_input=X).norms[0].reason


@pytest.mark.parametrize("batches", [None, "images", "synthetic"])
def test_a_silent_norm_gets_the_count_that_a_loud_one_gets(batches: str | None) -> None:
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(16, 3, 16, 16, generator=generator)] if batches == "images" else batches
    loud, silent = (
        normswap.inspect(net(runs=3, silent=own), example_input=X, groups="auto", batches=images)
        for own in (False, True)
    )
    assert silent.norms[1].reason.endswith("its γ is zero and counts as one")
    assert "counts as one" not in loud.norms[1].reason
    if batches is None:
        assert (silent.norms[1].groups, silent.norms[1].drift) == (loud.norms[1].groups, loud.norms[1].drift)
    assert silent.norms[1].groups not in (32, 8)  # the most that were compared
    assert silent.norms[1].drift
    converted = normswap.convert(net(runs=3, silent=True), example_input=X, groups="auto", batches=images)
    assert not converted[4].weight.any()  # type: ignore[index]


def test_dead_channels_do_not_give_the_most_groups() -> None:
    model = net(runs=3)
    model[4] = nn.BatchNorm2d(256)
    model[3] = nn.Conv2d(64, 256, 3)
    nn.init.zeros_(model[4].running_var)  # type: ignore[arg-type]
    nn.init.ones_(model[4].running_mean)  # type: ignore[arg-type]
    plan = normswap.inspect(model.eval(), example_input=X, groups="auto")
    assert plan.norms[1].groups == 32  # every count drifts alike, and the usual one is taken
