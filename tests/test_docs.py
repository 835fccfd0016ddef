"""docs/loading.md and docs/limits.md tell the truth: their Python runs, and their links lead somewhere."""

import contextlib
import io
import re
import warnings
from pathlib import Path

import pytest
import timm
import torch
from equality import assert_same_output

import normswap

DOCS = Path(__file__).parent.parent / "docs"
TEXT = (DOCS / "loading.md").read_text(encoding="utf-8")
LIMITS = (DOCS / "limits.md").read_text(encoding="utf-8")
EQUALIZATION = (DOCS / "equalization.md").read_text(encoding="utf-8")
PERCENT = re.compile(r"(\d+) ?%")


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    normswap.save(normswap.convert(timm.create_model("resnet18")), "OUT")
    scope: dict[str, object] = {}
    for block in re.findall(r"^```python\n(.*?)^```", TEXT, flags=re.DOTALL | re.MULTILINE):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(compile(block, "loading.md", "exec"), scope)
    x = torch.randn(1, 3, 64, 64)
    assert_same_output(scope["again"].eval()(x), scope["model"](x))  # type: ignore[attr-defined, operator]
    assert [feature.shape[1] for feature in scope["backbone"](x)] == [128, 256, 512]  # type: ignore[operator]
    assert scope["wrapped"](x).logits.shape == (1, 10)  # type: ignore[operator]


def test_limits_are_what_the_snippets_print() -> None:
    scope: dict[str, object] = {}
    found = re.findall(r"^```python\n(.*?)^```", LIMITS, flags=re.DOTALL | re.MULTILINE)
    assert len(found) == 4
    for block in found:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block, "limits.md", "exec"), scope)
        said = "".join(line.removeprefix("# ") + "\n" for line in block.splitlines() if line.startswith("#"))
        assert PERCENT.sub("%", printed.getvalue()) == PERCENT.sub("%", said)
        for now, then in zip(PERCENT.findall(printed.getvalue()), PERCENT.findall(said), strict=True):
            assert abs(int(now) - int(then)) <= (then != "0")  # a processor that rounds otherwise; nothing is nothing


def test_equalization_is_what_the_snippet_prints() -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```", EQUALIZATION, flags=re.DOTALL | re.MULTILINE)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block, "equalization.md", "exec"), {})
    assert printed.getvalue() == "".join(
        line.removeprefix("# ") + "\n" for line in block.splitlines() if line.startswith("#")
    )


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)]+)\)", TEXT + LIMITS + EQUALIZATION))
def test_links(link: str) -> None:
    assert (DOCS / link).exists()


def test_every_example_is_listed() -> None:
    for path in (DOCS.parent / "examples").glob("*.py"):
        assert f"../examples/{path.name}" in TEXT


ROOT = DOCS.parent
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
