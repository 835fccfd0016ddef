"""Copies are what deepcopy makes, with data or without."""

import copy
from typing import Any

import pytest
import timm
import torch
from torch import nn

from normswap.layers.convs import WSConv2d
from normswap.networks.copying import copy_model, meta_copy


class Odd(nn.Module):
    """Attributes that copy in their own ways, several of them shared."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.again = self.conv
        self.listed = [self.conv, {"conv": self.conv}]
        self.sizes: dict[Any, Any] = {1: (2, [3]), "more": {"deep": [self.conv.weight]}}
        self.alias = self.sizes
        self.me = [self]
        self.tags = {"a"}
        self.kept: dict[str, int] = {}
        self.empty = self.kept


class Own(nn.Module):
    """Says itself how it is copied, from a child that must be whole by then."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Own":
        made = Own()
        made.inner = copy.deepcopy(self.inner, memo)
        made.seen = made.inner.in_features
        return made


class WithState(nn.Module):
    """Changes what is kept of it, as RNNs do."""

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "note": "kept"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "note": state["note"].upper()})


def test_shared_attributes_stay_shared() -> None:
    model = Odd()
    twin = copy_model(model)
    assert twin.again is twin.conv is twin.listed[0] is twin.listed[1]["conv"]
    assert twin.conv is not model.conv
    assert twin.alias is twin.sizes
    assert twin.empty is twin.kept
    assert twin.sizes["more"]["deep"][0] is twin.conv.weight
    assert (twin.sizes[1], twin.tags, twin.me[0]) == ((2, [3]), {"a"}, twin)
    twin.sizes[1][1].append(0)
    twin.tags.add("b")
    twin.kept["x"] = 1
    assert (model.sizes[1], model.tags, model.kept) == ((2, [3]), {"a"}, {})


def test_classes_that_copy_themselves_are_asked() -> None:
    twin = copy_model(nn.Sequential(Own(), WithState()))
    assert twin[0].seen == 2
    assert twin[1].note == "KEPT"


@pytest.mark.parametrize(
    "build",
    [
        lambda: timm.create_model("test_resnet"),
        lambda: nn.LSTM(2, 3),
        lambda: nn.Sequential(WSConv2d.of(nn.Conv2d(3, 4, 3), adaptive=True)),
    ],
    ids=["timm", "LSTM", "standardized"],
)
def test_copies_equal_what_deepcopy_makes(build: Any) -> None:
    model = build()
    usual, ours, empty = copy.deepcopy(model), copy_model(model), meta_copy(model)
    for (name, a), (_, b), (_, c) in zip(*(m.named_modules() for m in (usual, ours, empty)), strict=True):
        assert type(a) is type(b) is type(c), name
        assert list(vars(a)) == list(vars(b)) == list(vars(c)), name
    state = usual.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in ours.state_dict().items())
    assert {k: (v.shape, v.dtype) for k, v in empty.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in state.items()
    }
    assert all(tensor.is_meta for tensor in (*empty.parameters(), *empty.buffers()))
    ours.load_state_dict(state)
    assert [p.requires_grad for p in empty.parameters()] == [p.requires_grad for p in model.parameters()]
