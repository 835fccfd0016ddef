"""Structured pruning changes how many filters a layer has: it works on folded networks, and says so on others."""

import pytest
from nets import SMALL_IMAGES as X
from torch import nn

import normswap

pytestmark = pytest.mark.filterwarnings("ignore")


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
