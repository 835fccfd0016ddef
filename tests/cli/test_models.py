"""How the command line reads shapes and names folders."""

import pytest
from click.testing import CliRunner

from normswap.cli.app import cli
from normswap.cli.models import folder_name


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
