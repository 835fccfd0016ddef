"""Along a residual stream every layer reads what all before it made: plans stay small, and decisions see all of it."""

import json

import pytest
import torch
from badnets import trained
from torch import Tensor, nn

import normswap
from normswap.planning.decisions import MORE

X = torch.zeros(2, 3, 6, 6)


class Stream(nn.Module):
    """A pre-activation network; what its stream holds at the end may be read by something else, too."""

    def __init__(self, depth: int, *, inplace: bool = False, last: nn.Module | None = None) -> None:
        super().__init__()
        self.inplace, self.stem, self.out = inplace, nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)) for _ in range(depth)
        )
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            if self.inplace:
                x += layer(x)
            else:
                x = x + layer(x)
        return self.out(x) if self.last is None else self.out(x) + self.last(x)


def plan_of(model: nn.Module, **options: object) -> normswap.Plan:
    return normswap.inspect(model, example_input=X, **options)  # type: ignore[arg-type]


def entry(plan: normswap.Plan, name: str) -> normswap.NormEntry | normswap.ConvEntry:
    return next(entry for entry in plan.entries if entry.name == name)


@pytest.mark.parametrize("inplace", [False, True], ids=["added", "added in place"])
def test_a_plan_grows_with_depth_and_not_with_its_square(inplace: bool) -> None:
    short, long = (len(json.dumps(plan_of(Stream(n, inplace=inplace)).to_dict())) for n in (20, 80))
    assert long < 4.5 * short
    plan = plan_of(Stream(20, inplace=inplace))
    assert entry(plan, "stem").feeds == (*(f"layers.{i}.0" for i in range(8)), MORE)  # type: ignore[union-attr]
    assert entry(plan, "out").fed_by == ("stem", *(f"layers.{i}.2" for i in range(7)), MORE)  # type: ignore[union-attr]
    assert all(entry.changes for entry in plan.entries)


@pytest.mark.parametrize("depth", [3, 20])
def test_a_norm_that_stays_far_down_keeps_every_convolution_before_it(depth: int) -> None:
    plan = plan_of(Stream(depth), exclude="out")
    assert {entry.reason for entry in plan.convs} == {"its output is read by out, which is left as it is"}


@pytest.mark.parametrize("depth", [3, 20])
def test_what_else_reads_far_down_keeps_every_convolution_before_it(depth: int) -> None:
    plan = plan_of(Stream(depth, last=nn.Sigmoid()))
    assert {entry.reason for entry in plan.convs} == {"its output is read by <sigmoid>"}


@pytest.mark.parametrize("depth", [3, 20])
def test_a_trained_norm_far_down_makes_every_convolution_adaptive(depth: int) -> None:
    model = Stream(depth)
    assert {entry.ws for entry in plan_of(model).convs} == {"standard"}
    trained(model.out)
    assert {entry.ws for entry in plan_of(model).convs} == {"adaptive"}


@pytest.mark.parametrize("depth", [3, 20])
def test_a_convolution_whose_norms_read_more_is_not_standardized_without_its_scale(depth: int) -> None:
    model, name = trained(Stream(depth)), f"layers.{depth - 2}.2"
    plan = plan_of(model, batches=[torch.randn(4, 3, 6, 6)], overrides={name: {"ws": "standard"}})
    (chosen,) = (entry for entry in plan.convs if entry.name == name)
    assert chosen.ws == "adaptive"
    assert "behind the standard form is not known" in chosen.reason
    assert all(entry.drift_before is not None for entry in plan.norms)
