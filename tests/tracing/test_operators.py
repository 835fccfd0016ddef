"""What operators do to the values they read, by name and by how many operands are data."""

import pytest
import torch
import torchvision  # noqa: F401  (its operators)

from normswap.tracing.graph import Kind
from normswap.tracing.operators import base_name, kind_of

aten = torch.ops.aten
KINDS = {
    "view": ("view", 1, 0, Kind.VIEW),
    "gather of two": ("index_select", 2, 0, Kind.CAT),
    "pool": ("avg_pool2d", 1, 0, Kind.POOL),
    "cat": ("cat", 2, 0, Kind.CAT),
    "sum of two": ("add", 2, 0, Kind.ADD),
    "plus a parameter": ("add", 1, 1, Kind.SCALE),
    "times a parameter": ("mul", 1, 1, Kind.SCALE),
    "product of two": ("mul", 2, 0, Kind.OTHER),
    "convolution": ("convolution", 1, 2, Kind.CONV),
    "linear": ("addmm", 1, 2, Kind.LINEAR),
    "attention": ("bmm", 2, 0, Kind.OTHER),
    "product without parameters": ("mm", 1, 0, Kind.OTHER),
    "norm": ("native_layer_norm", 1, 2, Kind.OTHER_NORM),
    "activation": ("relu", 1, 0, Kind.OTHER),
    "unknown": ("zeta", 1, 0, Kind.OTHER),
}


@pytest.mark.parametrize(("name", "data", "parameters", "kind"), KINDS.values(), ids=KINDS)
def test_kinds(name: str, data: int, parameters: int, kind: Kind) -> None:
    assert kind_of(name, data, parameters) is kind


NAMES = {
    "overload": (aten.add.Tensor, "add"),
    "in place": (aten.relu_.default, "relu"),
    "another's": (torch.ops.torchvision.nms.default, "torchvision::nms"),
    "private": (aten._unsafe_view.default, "unsafe_view"),
}


@pytest.mark.parametrize(("operator", "name"), NAMES.values(), ids=NAMES)
def test_base_names(operator: object, name: str) -> None:
    assert base_name(operator) == name
