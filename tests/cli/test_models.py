"""How the command line reads shapes and names folders."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import normswap
from normswap.cli.app import cli
from normswap.cli.models import folder_name


class Talking(nn.Module):
    """Prints the size of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        print("sees", tuple(x.shape))
        return self.norm(self.conv(x))  # type: ignore[no-any-return]


def without_data() -> nn.Module:
    return Talking().to("meta")


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize("shape", ["2,3,x", "2,,3", "0,3,4", ""])
def test_bad_shapes(shape: str) -> None:
    code, _, stderr = run("inspect", "test_resnet", "--no-pretrained", "--input", shape)
    assert code == 2
    assert "is no shape; write sizes as in 2,3,64,64" in stderr


def test_folder_names() -> None:
    assert folder_name("timm/resnet50.a1_in1k") == "timm-resnet50.a1_in1k-normswap"
    assert folder_name("local-dir:/data/nets/BN") == "BN-normswap"
    assert folder_name("hf-hub:user/name@main") == "user-name-main-normswap"
    assert folder_name("package.module:factory") == "package.module-factory-normswap"


def test_what_a_network_prints_is_no_part_of_the_json() -> None:
    code, stdout, stderr = run("inspect", f"{__name__}:Talking", "--json")
    assert (code, json.loads(stdout)["plan"]["entries"][0]["name"]) == (0, "conv")
    assert "sees (2, 3" in stderr
    assert run("inspect", f"{__name__}:Talking")[1].startswith("sees")


def test_a_network_without_data_is_not_written(tmp_path: Path) -> None:
    code, _, stderr = run("convert", f"{__name__}:without_data", "-o", str(tmp_path / "OUT"))
    assert code == 1
    assert stderr == "normswap: conv.weight has no data (meta device); load the network's weights first\n"
    assert not (tmp_path / "OUT").exists()


def test_nothing_is_told_of_a_network_without_data(tmp_path: Path) -> None:
    x = torch.zeros(2, 3, 8, 8)
    converted = normswap.convert(without_data(), example_input=x)
    with pytest.raises(normswap.UnsupportedModel, match=r"conv.weight has no data \(meta device\); load"):
        normswap.calibrate(converted, without_data(), [x, x])
    with pytest.raises(normswap.UnsupportedModel, match=r"conv.weight has no data \(meta device\); load"):
        normswap.export(converted, tmp_path / "x.pt2", to="torch")
