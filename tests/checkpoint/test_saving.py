"""What save writes, and what it leaves where it cannot."""

import os
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch.nn.utils import parametrizations, prune

import normswap


def test_files_have_the_umasks_permissions_and_no_leftovers(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        normswap.save(normswap.convert(timm.create_model("test_resnet")), tmp_path / "OUT")
    finally:
        os.umask(old)
    files = sorted((tmp_path / "OUT").iterdir())
    assert [file.name for file in files] == ["README.md", "config.json", "model.safetensors"]
    assert {file.stat().st_mode & 0o777 for file in files} == {0o640}


def test_failed_write_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = normswap.convert(timm.create_model("test_resnet")).eval()
    normswap.save(model, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(normswap.CheckpointError, match="cannot be written \\(No space left on device\\)"):
        normswap.save(model, tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_meta_models_are_not_saved(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = normswap.convert(timm.create_model("test_resnet"))
    with pytest.raises(normswap.CheckpointError, match="has no data \\(meta device\\)"):
        normswap.save(model, tmp_path)


COMPUTED = {
    "pruned": ("conv1.0", "weight", lambda conv: prune.l1_unstructured(conv, "weight", 0.5)),
    "weight_norm": ("conv1.0", "weight", parametrizations.weight_norm),
    "pruned norm": ("bn1", "weight", lambda norm: prune.l1_unstructured(norm, "weight", 0.5)),
    "pruned bias of a norm": ("bn1", "bias", lambda norm: prune.l1_unstructured(norm, "bias", 0.5)),
}


@pytest.mark.parametrize(("layer", "tensor", "compute"), COMPUTED.values(), ids=COMPUTED)
def test_what_is_computed_is_refused_by_name(layer: str, tensor: str, compute: Any, tmp_path: Path) -> None:
    model = normswap.convert(timm.create_model("test_resnet"))
    model.default_cfg = model.pretrained_cfg = {}
    compute(model.get_submodule(layer))
    with pytest.raises(normswap.CheckpointError, match=f"^{layer}: its {tensor} is computed .*make that permanent"):
        normswap.save(model, tmp_path / "OUT")
    assert not (tmp_path / "OUT").exists()
