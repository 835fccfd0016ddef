"""--report and --plot: what they write, and what is known to fail before the work begins."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from normswap.cli.app import cli

BUILDING = "normswap.sources.opening.open_model"


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stderr


@pytest.mark.parametrize("verb", ["convert", "dry run", "inspect"])
def test_the_page_holds_the_command_as_it_was_typed(verb: str, tmp_path: Path) -> None:
    page = tmp_path / "a page.html"
    words = ["inspect" if verb == "inspect" else "convert", "test_resnet", "--no-pretrained", "--report", str(page)]
    words += {"convert": ["-o", str(tmp_path / "OUT")], "dry run": ["--dry-run"], "inspect": []}[verb]
    assert run(*words) == (0, "")
    text = page.read_text("utf-8")
    assert f"<pre>normswap {' '.join(words).replace(str(page), f'&#x27;{page}&#x27;')}</pre>" in text
    assert text.count("GroupNorm(") >= 15
    assert ("batch independence" in text) is (verb == "convert")


def test_a_converted_folder_has_a_page_too(tmp_path: Path) -> None:
    out, page = tmp_path / "OUT", tmp_path / "plan.html"
    assert run("convert", "test_resnet", "--no-pretrained", "-o", str(out))[0] == 0
    assert run("inspect", str(out), "--report", str(page)) == (0, "")
    assert "layer1.0.bn" in page.read_text("utf-8")


def test_a_network_without_batch_norm_has_a_page_that_says_so(tmp_path: Path) -> None:
    code, stderr = run("inspect", "vit_tiny_patch16_224", "--no-pretrained", "--report", str(tmp_path / "a.html"))
    assert code == 3
    assert "no BatchNorm" in stderr
    assert "0 of 0 norms" in (tmp_path / "a.html").read_text("utf-8")


@pytest.mark.parametrize(
    "words", [("inspect", "--report"), ("inspect", "--plot"), ("convert", "--report")], ids=" ".join
)
@pytest.mark.parametrize(("place", "why"), [("nowhere/a.svg", "there is no folder"), (".", "Is a directory")])
def test_a_place_that_cannot_be_written_is_told_before_anything_is_built(
    words: tuple[str, str], place: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BUILDING, lambda *_, **__: pytest.fail("built a network first"))
    code, stderr = run(words[0], "test_resnet", words[1], str(tmp_path / place))
    assert code == 2
    assert f"{words[1]} {tmp_path / place}: {why}" in stderr
    assert list(tmp_path.iterdir()) == []


def test_the_demo_knows_where_it_draws_before_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normswap.demo.comparison.run", lambda **_: pytest.fail("trained first"))
    code, stderr = run("demo", "--plot", str(tmp_path / "nowhere" / "a.png"))
    assert (code, stderr.count("\n")) == (2, 1)
    assert "make it first" in stderr
    assert run("demo", "--plot", str(tmp_path / "a.xyz"))[0] == 2


def test_a_page_that_is_there_stays_where_the_conversion_fails(tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    page.write_text("old")
    code, _ = run("convert", "no_such_model", "--report", str(page), "-o", str(tmp_path / "OUT"))
    assert code == 2
    assert page.read_text() == "old"


def test_a_page_does_not_go_into_the_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "OUT"
    out.mkdir()
    code, stderr = run("convert", "test_resnet", "--no-pretrained", "-o", str(out), "--report", str(out / "a.html"))
    assert code == 2
    assert f"{out} is for the checkpoint alone; write it elsewhere" in stderr
    assert list(out.iterdir()) == []
