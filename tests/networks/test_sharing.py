"""Copies share their filters where passes only read them, and never where one writes."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import broken
import pytest
import torch
from torch import Tensor, nn

import normswap
from normswap.networks.copying import copy_model
from normswap.networks.sharing import sparing


def shares(copy: nn.Module, model: nn.Module) -> list[bool]:
    pairs = zip(copy.state_dict().values(), model.state_dict().values(), strict=True)
    return [a.data_ptr() == b.data_ptr() for a, b in pairs]


def test_filters_are_shared_and_vectors_and_buffers_are_not() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model.register_buffer("table", torch.zeros(4, 4))
    assert shares(sparing(lambda: copy_model(model)), model) == [key == "0.weight" for key in model.state_dict()]
    assert not any(shares(copy_model(model), model))


class Writing(nn.Module):
    """Changes its filters in its forward pass, as layers with a largest norm do."""

    def __init__(self, change: Callable[[nn.Parameter], Any]) -> None:
        super().__init__()
        self.conv, self.change = nn.Conv2d(8, 8, 1), change

    def forward(self, x: Tensor) -> Tensor:
        self.change(self.conv.weight)
        y: Tensor = self.conv(x)
        return y


def caught(weight: nn.Parameter) -> None:
    with suppress(BaseException):
        weight.data.clamp_(-0.1, 0.1)


WRITES: dict[str, Callable[[nn.Parameter], Any]] = {
    "data": lambda weight: weight.data.mul_(0.5),
    "a view": lambda weight: weight.detach().flatten()[1:].zero_(),
    "out": lambda weight: torch.mul(weight.detach(), 0.5, out=weight.detach()),
    "foreach": lambda weight: torch._foreach_mul_([weight.detach()], 0.5),
    "whatever is raised": caught,
}


@pytest.mark.parametrize("change", WRITES.values(), ids=WRITES)
def test_what_writes_gets_memory_of_its_own(change: Callable[[nn.Parameter], Any]) -> None:
    model, x = Writing(change), torch.randn(2, 8, 3, 3)
    before, runs = model.conv.weight.detach().clone(), list[nn.Module]()

    def run() -> Tensor:
        runs.append(copy_model(model))
        y: Tensor = runs[-1](x)
        return y.detach()

    found = sparing(run)
    assert torch.equal(model.conv.weight, before)
    assert [any(shares(copy, model)) for copy in runs] == [True, False]
    assert torch.equal(found, model(x))
    assert not any(shares(copy_model(model), model))


def test_a_check_leaves_networks_that_write_to_their_filters_as_they_are() -> None:
    model = broken.Net(Writing(lambda weight: weight.data.mul_(0.5)))
    converted = normswap.convert(model, example_input=broken.X)
    before = [{key: value.clone() for key, value in one.state_dict().items()} for one in (model, converted)]
    assert normswap.check(converted, model)
    for one, state in zip((model, converted), before, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in one.state_dict().items())


def test_a_check_copies_no_filters(monkeypatch: pytest.MonkeyPatch) -> None:
    model = broken.Net()
    converted = normswap.convert(model, example_input=broken.X)
    cloned = list[torch.Size]()
    usual = Tensor.clone

    def clone(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        cloned.append(tensor.shape)
        return usual(tensor, *args, **kwargs)

    monkeypatch.setattr(Tensor, "clone", clone)
    assert normswap.check(converted, model)
    filters = {parameter.shape for parameter in model.parameters() if parameter.ndim > 1}
    assert cloned
    assert not filters.intersection(cloned)
