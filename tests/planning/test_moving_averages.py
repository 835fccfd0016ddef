"""A network and its moving average in one model go on as such."""

import copy

import pytest
import torch
from torch import Tensor, nn

import normswap
from normswap.planning.moving_averages import FEWEST, moving_averages

CHANNELS = 16


def branch() -> nn.Sequential:
    made = nn.Sequential(nn.Conv2d(3, CHANNELS, 3), nn.BatchNorm2d(CHANNELS), nn.ReLU(), nn.Flatten())
    norm = nn.BatchNorm1d(CHANNELS)
    made.extend([nn.Linear(CHANNELS * 16, CHANNELS), norm])
    for own in (made[1], norm):
        nn.init.normal_(own.running_mean)  # type: ignore[arg-type]
        nn.init.uniform_(own.running_var, 0.3, 3)  # type: ignore[arg-type]
    return made


class Momentum(nn.Module):
    """Two networks of one architecture, of which the second is to follow the first (BYOL, MoCo)."""

    def __init__(self, noise: float, *, frozen: bool) -> None:
        super().__init__()
        self.online = branch()
        self.target = copy.deepcopy(self.online)
        for parameter in self.target.parameters():
            parameter.data += noise * parameter.std().nan_to_num() * torch.randn_like(parameter)
        self.target.requires_grad_(not frozen)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.target(x)
        return (self.online(x) - wanted).square().mean(1)  # type: ignore[no-any-return]


X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0)).double()


@torch.no_grad()
def moved_by_averaging(model: nn.Module) -> float:
    """Return how far half a step towards the first network moves what the second computes."""
    after = copy.deepcopy(model.target)
    for own, other in zip(after.parameters(), model.online.parameters(), strict=True):  # type: ignore[union-attr, operator]
        own.lerp_(other, 0.5)
    before = model.target(X)  # type: ignore[operator]
    return float((after(X) - before).norm() / before.norm())  # type: ignore[operator]


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_an_average_follows_the_converted_network_as_it_did(noise: float, frozen: bool) -> None:
    torch.manual_seed(0)
    model = Momentum(noise, frozen=frozen).double().eval()
    converted = normswap.convert(model, example_input=X)
    assert moved_by_averaging(converted) <= 2 * moved_by_averaging(model) + 1e-9
    norms = {entry.name: entry for entry in normswap.plan_of(converted).norms}
    assert norms["online.1"].not_equalized == (
        "target.0 holds nearly the filters of online.0, as a moving average does"
    )


def test_a_fresh_network_and_its_average_stay_one_function() -> None:
    torch.manual_seed(0)
    model = Momentum(0.0, frozen=True).double().eval()
    for name, norm in model.named_modules():
        if name.endswith((".1", ".5")):
            norm.reset_running_stats()  # type: ignore[operator]
    converted = normswap.convert(model, example_input=X)
    assert {entry.ws for entry in normswap.plan_of(converted).convs} == {"adaptive"}
    assert converted.online(X).equal(converted.target(X))  # type: ignore[operator]


class Following(Momentum):
    """Takes a step of the average in its forward, as MoCo does."""

    def __init__(self, *, past_torch: bool) -> None:
        super().__init__(0.0, frozen=True)
        self.past_torch = past_torch

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for own, other in zip(self.target.parameters(), self.online.parameters(), strict=True):
                if self.past_torch:
                    own.data = own.data * 0.9 + other.data * 0.1
                else:
                    own.mul_(0.9).add_(other, alpha=0.1)
        return super().forward(x)


@pytest.mark.parametrize("past_torch", [False, True], ids=["in place", "data"])
def test_an_average_that_the_forward_takes_is_no_reader(past_torch: bool) -> None:
    torch.manual_seed(0)
    plan = normswap.inspect(Following(past_torch=past_torch).double().eval(), example_input=X)
    assert [(entry.name, entry.converts) for entry in plan.entries] == [
        (f"{branch}.{place}", True) for branch in ("online", "target") for place in (0, 1, 5)
    ]


def test_layers_apart_are_no_copies() -> None:
    torch.manual_seed(0)
    layers: dict[str, nn.Module] = {str(index): nn.Conv2d(3, 16, 3) for index in range(20)}
    layers |= {"small": nn.Conv2d(1, FEWEST - 1, 1), "alike": nn.Conv2d(1, FEWEST - 1, 1)}
    layers |= {"zero": nn.Conv2d(4, 4, 3), "also zero": nn.Conv2d(4, 4, 3), "meta": nn.Conv2d(3, 16, 3, device="meta")}
    layers["alike"].weight = nn.Parameter(layers["small"].weight.detach().clone())  # type: ignore[arg-type, operator]
    for name in ("zero", "also zero"):
        nn.init.zeros_(layers[name].weight)  # type: ignore[arg-type]
    assert moving_averages(layers) == {}
    layers["average"] = copy.deepcopy(layers["3"])
    assert moving_averages(layers) == {"3": "average", "average": "3"}
