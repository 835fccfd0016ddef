"""Pages tell the truth: every block of Python runs alone, commands print what is said, and links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner
from pages import PAGES, ROOT, Block, assert_alike, blocks, run_alone

import normswap
from normswap.cli.app import cli

DOCS, README = ROOT / "docs", ROOT / "README.md"
LINKS = [
    (path, link) for path in PAGES for link in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8"))
]


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_runs_alone_and_prints_what_it_says(block: Block, tmp_path: Path) -> None:
    assert_alike(run_alone(block, tmp_path), block.said, tolerance=1)


COMMANDS = [block for block in blocks("console") if block.text.startswith("$ ")]
DEMO = "$ normswap demo\n"  # tests/demo runs it


@pytest.mark.parametrize("block", [block for block in COMMANDS if not block.text.startswith(DEMO)], ids=str)
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
    readme = README.read_text(encoding="utf-8")
    assert "pip install . && normswap demo" in readme
    assert all(block.text.startswith("$ normswap ") for block in COMMANDS)
    assert "pip install -e '.[test]' && pytest" in readme


def test_every_public_name_is_in_the_readme_in_ten_lines() -> None:
    section = README.read_text(encoding="utf-8").partition("## All names\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    assert len(rows) <= 10
    assert set(re.findall(r"`(\w+)`", "".join(rows))) == set(normswap.__all__)


@pytest.mark.parametrize(("path", "anchor"), re.findall(r"\]\(([^)#]*)#([^)]+)\)", README.read_text(encoding="utf-8")))
def test_places_in_pages_exist(path: str, anchor: str) -> None:
    text = (ROOT / path if path else README).read_text(encoding="utf-8")
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    assert anchor in [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
