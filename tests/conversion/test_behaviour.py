"""Checks by numbers where a network is random, has no numbers, or gives something else by mode."""

from collections.abc import Callable

import broken
import pytest
import torch
from torch import Tensor, nn

import normswap


def row(model: nn.Module, name: str) -> normswap.Check:
    converted = normswap.convert(model, example_input=broken.X)
    return next(row for row in normswap.check(converted, model).rows if row.name == name)


class Moody(nn.Module):
    """A layer with a parameter that computes something else in train mode."""

    def __init__(self, moody: bool) -> None:
        super().__init__()
        self.weight, self.moody = nn.Parameter(torch.ones(4)), moody

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight * (2 if self.training and self.moody else 1)


@pytest.mark.parametrize("moody", [False, True], ids=["same", "other"])
def test_where_a_network_is_random_its_layers_are_compared(moody: bool) -> None:
    found = row(broken.Net(nn.Dropout(0.5), Moody(moody)), "train() equals eval()")
    assert found.ok is not moody
    assert found.detail.endswith("(every layer with parameters; the network itself differs by mode)")


def test_a_network_that_gives_more_in_train_mode_is_compared_by_layer() -> None:
    class Auxiliary(broken.Net):
        def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:  # type: ignore[override]
            y = super().forward(x)
            return (y, y) if self.training else y

    found = row(Auxiliary(), "train() equals eval()")
    assert found.ok
    assert "the network itself differs by mode" in found.detail


def test_on_the_meta_device_there_are_no_numbers() -> None:
    with torch.device("meta"):
        model = broken.Net()
    rows = normswap.check(normswap.convert(model, example_input=broken.X), model).rows
    assert [(row.name, row.ok) for row in rows] == [
        ("shapes", True), ("no BatchNorm left", True), ("numbers", None),
    ]  # fmt: skip


def summed(x: Tensor) -> Tensor:
    return x.sum(0)


def listed(x: Tensor) -> list[Tensor]:
    return list(x.unbind())


def leaking(x: Tensor) -> list[Tensor]:
    return list((x + x.sum(0)).unbind())


class After(broken.Net):
    def __init__(self, then: Callable[[Tensor], Tensor | list[Tensor]]) -> None:
        super().__init__()
        self.then = then

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:  # type: ignore[override]
        return self.then(super().forward(x))


@pytest.mark.parametrize(
    ("then", "ok", "detail"),
    [
        (summed, None, "no output has one row per sample"),
        (listed, True, "changing the other samples moves a sample by"),
        (leaking, False, "changing the other samples moves a sample by"),
    ],
    ids=["sum", "list", "list that leaks"],
)
def test_batch_independence_by_what_a_network_gives(
    then: Callable[[Tensor], Tensor | list[Tensor]], ok: bool | None, detail: str
) -> None:
    found = row(After(then), "batch independence")
    assert found.ok is ok
    assert found.detail.startswith(detail)


def test_one_sample_cannot_tell_of_others() -> None:
    model = broken.Net()
    checks = normswap.check(normswap.convert(model, example_input=broken.X[:1]), model)
    assert ("batch independence", None, "the example holds one sample") in [
        (row.name, row.ok, row.detail) for row in checks.rows
    ]


def test_frozen_networks_want_no_gradient() -> None:
    found = row(broken.Net().requires_grad_(False), "gradients")
    assert (found.ok, found.detail) == (None, "no parameter wants a gradient")


def test_modes_flags_and_gradients_stay_as_they_were() -> None:
    model = broken.Net().eval()
    converted = normswap.convert(model, example_input=broken.X).train()
    converted.conv1.requires_grad_(False)  # type: ignore[union-attr]
    assert normswap.check(converted, model)
    assert converted.training
    assert not model.training
    assert not converted.conv1.weight.requires_grad  # type: ignore[union-attr]
    assert all(p.grad is None for p in [*model.parameters(), *converted.parameters()])
