"""The demo's figures and the data that ships with the package."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from normswap.cli.app import cli
from normswap.demo import comparison as demo
from normswap.demo.digits import digits_resnet, load_digits

DATA = Path(demo.__file__).parent / "data"


def test_data_is_small_licensed_and_split() -> None:
    assert sum(file.stat().st_size for file in DATA.iterdir()) < 1_000_000
    assert "CC BY 4.0" in (DATA / "digits-LICENSE.md").read_text()
    train, train_labels, test, test_labels = load_digits()
    assert (len(train), len(test)) == (1026, 771)
    assert train.shape[1:] == test.shape[1:] == (1, 8, 8)
    assert torch.cat([train_labels, test_labels]).bincount().min() > 170
    rows = {tuple(image.flatten().tolist()) for image in train}
    assert not any(tuple(image.flatten().tolist()) in rows for image in test)


def test_untrained_net_knows_nothing() -> None:
    torch.manual_seed(0)
    *_, images, labels = load_digits()
    assert demo.accuracy(digits_resnet(pretrained=False), images, labels) < 30
    assert demo.accuracy(digits_resnet(), images, labels) > 97


def test_normswap_keeps_what_copying_loses(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = CliRunner().invoke(cli, ["demo", "--json", "--plot", str(tmp_path / "curves.png")])
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    original, copied, ours = (data["accuracy"][name] for name in ("BatchNorm", "copied", "normswap"))
    assert ours["converted"] >= 0.85 * original["converted"]
    assert copied["converted"] < 0.6 * original["converted"]
    assert ours["tuned"] > copied["tuned"]
    assert data["checks_hold"] is True
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
