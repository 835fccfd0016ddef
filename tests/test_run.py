"""Scripts that know nothing of normswap."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import normswap

NAME = "test_efficientnet"


def trained(name: str, **arguments: object) -> nn.Module:
    """Build a network whose norms look trained, so that conversion is adaptive and matched."""
    model = timm.create_model(name, **arguments).eval()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model


@pytest.fixture(scope="module")
def converted() -> nn.Module:
    torch.manual_seed(0)
    return normswap.convert(trained(NAME, num_classes=10))


@pytest.fixture(scope="module")
def folder(converted: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return normswap.save(converted, tmp_path_factory.mktemp("timm") / "OUT")


SCRIPT = """
import sys
import timm, torch
assert sys.argv[1:] == [sys.argv[1], "--epochs", "1"], sys.argv
assert __name__ == "__main__"
import neighbour
model = timm.create_model("local-dir:" + sys.argv[1], pretrained=True, num_classes=2)
print(type(model.conv_stem).__name__, model(torch.ones(1, 3, 64, 64)).shape[1])
"""


@pytest.mark.parametrize("launcher", ["python", "python module", "torchrun"])
def test_scripts_that_know_nothing_of_normswap(launcher: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "neighbour.py").write_text("")
    start = {"python": [sys.executable, "-m", "normswap.run", "train.py"],
             "python module": [sys.executable, "-m", "normswap.run", "-m", "train"],
             "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=1", "--standalone",
                          "-m", "normswap.run", "train.py"]}[launcher]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*start, str(folder), "--epochs", "1"], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "WSConv2d 2\n"


def test_run_says_what_it_needs(tmp_path: Path) -> None:
    for arguments, message in ([], "usage: python -m normswap.run"), (["none.py"], "normswap: none.py: no such script"):
        result = subprocess.run([sys.executable, "-m", "normswap.run", *arguments], capture_output=True, text=True)
        assert result.returncode == 2
        assert result.stderr.startswith(message)
