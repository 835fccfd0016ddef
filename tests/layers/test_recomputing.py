"""Kernels are made again in the backward pass, and the gradients are what they are without."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import normswap
from normswap.layers.convs import WeightStandardized
from normswap.layers.recomputing import recomputing


@pytest.fixture
def model() -> nn.Module:
    convs = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 8, 3), nn.BatchNorm2d(8)]
    return normswap.convert(nn.Sequential(*convs), example_input=torch.zeros(2, 3, 8, 8)).double()


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(model(x).square().mean(), list(model.parameters())))


def test_gradients_are_the_same_to_the_bit(model: nn.Module) -> None:
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    expected = gradients(model, x)
    with recomputing(model):
        found = gradients(model, x)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(("again", "times"), [(False, 2), (True, 4)], ids=["kept", "made again"])
def test_kernels_are_made_once_more(model: nn.Module, again: bool, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = list[type]()
    usual = WeightStandardized.fresh_kernel

    def noted(conv: WeightStandardized) -> Tensor:
        made.append(type(conv))
        return usual(conv)

    monkeypatch.setattr(WeightStandardized, "fresh_kernel", noted)
    with recomputing(model) if again else nullcontext():
        gradients(model, torch.randn(2, 3, 8, 8, dtype=torch.float64))
    assert len(made) == times


def test_a_pruned_filter_is_left_to_autograd(model: nn.Module) -> None:
    prune.l1_unstructured(model[0], "weight", amount=0.5)  # type: ignore[no-untyped-call]
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    expected = gradients(model, x)
    with recomputing(model):
        assert all(map(torch.equal, gradients(model, x), expected))
