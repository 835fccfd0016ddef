"""What config.json says."""

import json
from pathlib import Path

import pytest
import timm
import torch

import normswap


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = normswap.convert(timm.create_model("resnet18", num_classes=10))
    return normswap.save(model, tmp_path_factory.mktemp("checkpoints") / "OUT")


def test_configuration_is_timms_plus_ours(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == "normswap"
    assert config["model_args"] == {"source": config["normswap"]["source"], "plan": config["normswap"]["plan"]}
    assert config["pretrained_cfg"]["classifier"] == "fc"
    assert config["num_classes"] == 10
    norm = next(e for e in config["normswap"]["plan"]["entries"] if e["name"] == "bn1")
    assert (norm["groups"], norm["eps"]) == (32, 1e-5)
    assert config["normswap"]["source"] == {
        "registry": "timm",
        "name": "resnet18.a1_in1k",
        "arguments": {"num_classes": 10},
    }
    assert "20 layers" in (folder / "README.md").read_text()
