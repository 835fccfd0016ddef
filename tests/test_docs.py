"""Pages tell the truth: every block of Python runs alone, commands print what is said, and links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner
from pages import PAGES, ROOT, Block, assert_alike, blocks, run_alone

from normswap.cli.app import cli

DOCS = ROOT / "docs"
LINKS = [
    (path, link) for path in PAGES for link in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8"))
]


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_runs_alone_and_prints_what_it_says(block: Block, tmp_path: Path) -> None:
    assert_alike(run_alone(block, tmp_path), block.said, tolerance=1)


@pytest.mark.parametrize("block", [b for b in blocks("console") if b.text.startswith("$")], ids=str)
def test_commands_print_what_they_say(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command, _, said = block.text.partition("\n")
    result = CliRunner().invoke(cli, shlex.split(command.removeprefix("$ normswap")))
    assert result.exit_code == 0, result.output
    assert_alike(result.stdout, said, tolerance=3)


def test_a_block_that_imports_too_little_fails(tmp_path: Path) -> None:
    forgotten = Block("here", 1, "python", "import timm\ntimm.create_model('normswap')\n")
    with pytest.raises(AssertionError, match=r"Unknown model \(normswap\)"):
        run_alone(forgotten, tmp_path)


@pytest.mark.parametrize(("page", "link"), LINKS, ids=lambda value: value.name if isinstance(value, Path) else value)
def test_links(page: Path, link: str) -> None:
    assert link.startswith("https://") or (page.parent / link).exists()


def test_every_example_is_listed() -> None:
    text = (DOCS / "loading.md").read_text(encoding="utf-8")
    for path in (ROOT / "examples").glob("*.py"):
        assert f"../examples/{path.name}" in text


STATED = re.findall(
    r"`((?:tests|normswap|docs|benchmarks|examples)/[\w./]+?)(?:::(\w+))?`",
    "".join((ROOT / name).read_text(encoding="utf-8") for name in ("SECURITY.md", "CONTRIBUTING.md")),
)
PROMISED = re.findall(r"`(test_\w+)`", (ROOT / "SECURITY.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("path", "test"), dict.fromkeys(STATED))
def test_files_and_tests_that_are_named_exist(path: str, test: str) -> None:
    assert (ROOT / path).exists()
    assert not test or f"def {test}(" in (ROOT / path).read_text(encoding="utf-8")


@pytest.mark.parametrize("test", dict.fromkeys(PROMISED))
def test_promises_have_the_tests_that_they_name(test: str) -> None:
    assert any(f"def {test}(" in path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))


def test_install_and_test_commands_are_stated() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "pip install . && normswap demo" in readme
    assert "pip install -e '.[test]' && pytest" in readme
