"""The demo's figures and the data that ships with the package."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from pages import assert_alike, blocks

from normswap.cli.app import cli
from normswap.demo import comparison as demo
from normswap.demo.digits import digits_resnet, load_digits

pytestmark = pytest.mark.timeout(900)  # the first test that needs the demo waits for it, on a busy machine for long

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


@pytest.fixture(scope="module")
def measured() -> demo.Demo:
    """What the demo measures, once: it takes half a minute."""
    threads = torch.get_num_threads()
    result = demo.run()
    assert torch.get_num_threads() == threads
    return result


def test_normswap_keeps_and_learns_what_others_lose_or_miss(measured: demo.Demo) -> None:
    assert measured.checks_hold
    rows = {row.name: row for row in measured.rows}
    assert rows["frozen"].kept == rows["BatchNorm"].kept
    assert rows["normswap"].kept >= 0.97 * rows["BatchNorm"].kept
    assert rows["copied"].kept < 0.6 * rows["BatchNorm"].kept
    assert rows["normswap"].best >= max(rows["BatchNorm"].best, rows["frozen"].best) + 10
    for row in measured.rows[1:]:  # BatchNorm on one image is up and down at rates as high as it needs
        assert row.best not in (row.tuned[0], row.tuned[-1]), f"{row.name} has its best at the edge of the rates"


def test_the_readme_shows_what_is_measured(measured: demo.Demo) -> None:
    (block,) = [block for block in blocks("console") if block.text.startswith("$ normswap demo\n")]
    # training on another processor ends elsewhere, at the highest rate by up to 30 points
    assert_alike(str(measured), block.text.partition("\n")[2], tolerance=30)


def test_the_verb_prints_and_draws_it(measured: demo.Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(demo, "run", lambda **_: measured)
    drawing = tmp_path / "demo.png"
    result = CliRunner().invoke(cli, ["demo", "--json", "--plot", str(drawing)])
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["tuning"] == {"steps": 400, "batch_size": 1, "learning_rates": list(demo.RATES), "seed": 0}
    assert data["accuracy"]["normswap"]["tuned"] == {
        str(rate): share for rate, share in zip(demo.RATES, measured.rows[-1].tuned, strict=True)
    }
    assert drawing.read_bytes().startswith(b"\x89PNG")
    assert CliRunner().invoke(cli, ["demo"]).stdout == f"{measured}\n"


def test_the_far_task_is_turned_and_inverted() -> None:
    image = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    assert torch.equal(demo.far(image), torch.tensor([[[[-2.0, -4.0], [-1.0, -3.0]]]]))
