"""Structured pruning changes how many filters a layer has: it works on folded networks, and says so on others."""

import pytest
import torch
from nets import moved, small_resnet
from torch import nn

import normswap

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def trained() -> nn.Module:
    """A converted network whose filters have moved since."""
    return moved(normswap.convert(small_resnet(), example_input=X))


def pruned(model: nn.Module) -> nn.Module:
    tp = pytest.importorskip("torch_pruning")
    importance = tp.importance.MagnitudeImportance(p=2)
    pruner = tp.pruner.MagnitudePruner(model, X, importance, pruning_ratio=0.5, ignored_layers=[model.fc])
    pruner.step()
    return model


def test_torch_pruning_halves_a_folded_network_and_it_trains(trained: nn.Module) -> None:
    before = sum(p.numel() for p in trained.parameters())
    model = pruned(normswap.fold(trained))
    assert sum(p.numel() for p in model.parameters()) < before / 3
    model(X).sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_filters_that_were_removed_are_named(trained: nn.Module) -> None:
    layer = trained.conv1
    layer._parameters["weight"] = nn.Parameter(layer._parameters["weight"][:32])  # type: ignore[index, operator]
    said = r"a WSConv2d was converted with 64 filters and now holds 32; .*normswap\.fold"
    with pytest.raises(normswap.UnsupportedModel, match=said):
        trained(X)
