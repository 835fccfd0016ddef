"""Folding standardization into plain convolutions."""

from pathlib import Path

import pytest
import timm
import torch
from equality import assert_same_output
from timm.layers import GroupNormAct
from torch import nn

import normswap


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = normswap.convert(timm.create_model("resnet18", num_classes=10))
    return normswap.save(model, tmp_path_factory.mktemp("checkpoints") / "OUT")


def test_fold_is_exact_and_keeps_the_keys(folder: Path) -> None:
    loaded = normswap.load(folder)
    folded = normswap.fold(loaded)
    x = torch.randn(2, 3, 64, 64)
    assert_same_output(folded(x), loaded(x))
    assert {type(m) for m in folded.modules() if "Conv" in type(m).__name__} == {nn.Conv2d}
    assert not any(entry.ws for entry in normswap.plan_of(folded).convs)
    assert not any(isinstance(m, GroupNormAct) for m in folded.modules())
