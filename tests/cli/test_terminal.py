"""On a terminal tables fit its width and names stay data; in a pipe they are plain, a line per row."""

import contextlib
import os
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from normswap.cli.app import cli
from normswap.tables import layout, rendered, shortened, stacked, table

pty = pytest.importorskip("pty")  # not on Windows

STYLE = re.compile(r"\x1b\[[0-9;]*m")
LONG = "test_texts:evil_names"
SHAPE = ("--input", "2,3,16,16")


def on_a_terminal(monkeypatch: pytest.MonkeyPatch, columns: int, *arguments: str) -> tuple[int, str]:
    """Run a verb whose standard output is a terminal of so many columns."""
    reader, writer = pty.openpty()
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    parts: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # what reading ends with once the other end is closed
            while chunk := os.read(reader, 4096):
                parts.append(chunk)

    thread = threading.Thread(target=read)
    thread.start()
    with open(writer, "w", encoding="utf-8") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        with pytest.raises(SystemExit) as ended:
            cli.main(list(arguments))
    thread.join(30)
    os.close(reader)
    code = ended.value.code
    return code if isinstance(code, int) else 0, b"".join(parts).decode().replace("\r\n", "\n")


VERBS: dict[str, tuple[str, ...]] = {
    "inspect": ("inspect", "mobilenetv2_100", "--no-pretrained"),
    "inspect long names": ("inspect", "densenet121", "--no-pretrained", "--exclude", "features.denseblock1"),
    "convert": ("convert", "test_resnet", "--no-pretrained", "-o", "OUT"),
}


@pytest.mark.parametrize("columns", [80, 132])
@pytest.mark.parametrize("arguments", VERBS.values(), ids=VERBS)
def test_tables_fit_the_terminal(
    arguments: tuple[str, ...], columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, shown = on_a_terminal(monkeypatch, columns, *arguments)
    assert code == 0
    lines = STYLE.sub("", shown).split("\n")
    assert max(map(len, lines)) <= columns
    assert any(set(line) == {"-"} for line in lines)
    assert "GroupNorm(32)" in shown or "ok  shapes" in shown or "ok " in shown
    assert not re.search(r"\w…$", "\n".join(lines), flags=re.MULTILINE)  # nothing is cut off at the edge


def test_names_are_shortened_in_the_middle_and_reasons_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    _, shown = on_a_terminal(monkeypatch, 80, "inspect", "densenet121", "--no-pretrained")
    text = STYLE.sub("", shown)
    assert re.search(r"^features?.*…\S*norm1 ", text, flags=re.MULTILINE)
    assert "features.denseblock1.denselayer1.norm1" not in text
    piped = CliRunner().invoke(cli, ["inspect", "densenet121", "--no-pretrained"]).stdout
    assert "\nfeatures.denseblock1.denselayer1.norm1 " in piped


@pytest.mark.parametrize("environment", [{}, {"FORCE_COLOR": "1"}, {"COLUMNS": "20"}, {"TTY_COMPATIBLE": "1"}], ids=str)
def test_what_is_piped_is_plain_and_one_line_per_layer(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(cli, ["inspect", "mobilenetv2_100", "--no-pretrained"])
    lines = result.stdout.split("\n")
    assert "\x1b" not in result.stdout
    assert not set("│─┃━┏┓") & set(result.stdout)
    assert all(line == line.rstrip() for line in lines)
    header = lines[0]
    for line in lines[2:40]:
        assert all(line[header.index(title) - 1] == " " for title in ("becomes", "drift", "why") if len(line) > 60)
        assert re.match(r"\S+ +\S", line)


EVIL: dict[str, Callable[[str], str]] = {
    "table": lambda name: table([(name, "b")], header=("name", "other")),
    "layout": lambda name: rendered(layout([(name, name)], header=("name", "other"), names=("name",)), 500),
    "lines": lambda name: rendered(stacked(name, "b"), 500),
}


@pytest.mark.parametrize("shown", EVIL.values(), ids=EVIL)
@pytest.mark.parametrize(
    "name", ["[red]x[/red]", "[link=http://a]b[/link]", "a[/]b", ":smile:", "http://a.b/c", "[bold", "1.5 True None"]
)
def test_markup_in_names_is_text(name: str, shown: Callable[[str], str]) -> None:
    assert name in shown(name)


@pytest.mark.parametrize("shown", EVIL.values(), ids=EVIL)
def test_escapes_in_names_are_written_out(shown: Callable[[str], str]) -> None:
    text = shown("a\x1b[2J\x07\x9b31m\x08b")
    assert "a\\x1b[2J\\x07\\x9b31m\\x08b" in text
    assert all(line.isprintable() for line in text.split("\n"))


def test_escapes_in_names_do_not_reach_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments in (("inspect", LONG, *SHAPE), ("convert", LONG, *SHAPE, "--dry-run")):
        _, shown = on_a_terminal(monkeypatch, 80, *arguments)
        text = STYLE.sub("", shown)  # of rich there is bold alone
        assert all(line.isprintable() for line in text.split("\n"))
        assert set(STYLE.findall(shown)) <= {"\x1b[1m", "\x1b[0m"}


@pytest.mark.parametrize(
    ("width", "text"),
    [
        (40, "layer4.0.downsample.1"),
        (12, "layer4…ple.1"),
        (3, "l…1"),
        (2, "la"),
        (1, "l"),
        (21, "layer4.0.downsample.1"),
    ],
)
def test_the_middle_is_left_out(width: int, text: str) -> None:
    assert shortened("layer4.0.downsample.1", width) == text


def test_summaries_of_verbs_are_whole() -> None:
    shown = " ".join(CliRunner().invoke(cli, ["--help"]).stdout.split())
    shown = shown.partition("Commands: ")[2]
    assert "..." not in shown
    for name, verb in cli.commands.items():
        first = (verb.help or "").partition("\n\n")[0].replace("\n", " ")
        assert f"{name} {' '.join(first.split())}".rstrip(".") in shown


@pytest.mark.parametrize("to", ["onnx", "torch"])
def test_exporting_says_nothing_on_the_side(to: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import logging

    import badnets

    import normswap

    logging.getLogger("torch").setLevel(logging.WARNING)
    model = normswap.convert(badnets.small(), example_input=badnets.X)
    normswap.export(model, tmp_path / "net", to=to)
    assert capfd.readouterr() == ("", "")
