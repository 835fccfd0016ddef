"""The README tells the truth: its Python runs, and its commands print what it says."""

import contextlib
import io
import re
import shlex
import warnings
from pathlib import Path

import pytest
from click.testing import CliRunner

from normswap.cli.app import cli
from normswap.networks import recognition as families

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
PERCENT, SECONDS = re.compile(r"\d+\.\d %"), re.compile(r"\d+ s\b")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def test_python_blocks_print_what_they_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(families, "_NORMS", {})
    scope: dict[str, object] = {}
    assert len(blocks("python")) == 4
    for block in blocks("python"):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(compile(block, "README.md", "exec"), scope)
        said = [line.removeprefix("#").removeprefix(" ") for line in block.splitlines() if line.startswith("#")]
        assert printed.getvalue().splitlines() == said


@pytest.mark.parametrize("block", [b for b in blocks("console") if b.startswith("$")], ids=lambda b: b.splitlines()[0])
def test_commands_print_what_they_say(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command, _, said = block.partition("\n")
    result = CliRunner().invoke(cli, shlex.split(command.removeprefix("$ normswap")))
    assert result.exit_code == 0, result.output
    ours, theirs = SECONDS.sub("N s", result.stdout), SECONDS.sub("N s", said)
    for now, then in zip(PERCENT.findall(ours), PERCENT.findall(theirs), strict=True):
        assert abs(float(now[:-2]) - float(then[:-2])) <= 3  # training on another processor ends a little elsewhere
    assert PERCENT.sub("P", ours).split() == PERCENT.sub("P", theirs).split()


def test_install_and_test_commands_are_stated() -> None:
    assert "pip install . && normswap demo" in README
    assert "pip install -e '.[test]' && pytest" in README
