"""What a newcomer reads, block by block, and a fresh process in which a block of Python runs as if pasted alone."""

import contextlib
import multiprocessing
import os
import re
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
PERCENT, SECONDS = re.compile(r"(\d+(?:\.\d+)?) ?%"), re.compile(r"\d+ s\b")
HEAVY = ["torch", "timm", "torchvision"]
"""Imported once and shared by the processes that blocks run in; a block must import what it names all the same."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; `said` is what it says that its Python prints: its comments that begin a line."""

    page: str
    line: int
    language: str
    text: str

    @property
    def said(self) -> str:
        """What the block says that it prints."""
        return "".join(line.removeprefix("#").removeprefix(" ") + "\n" for line in self.text.splitlines()
                       if line.startswith("#"))  # fmt: skip

    def __str__(self) -> str:
        """Return where the block is, for the name of its test."""
        return f"{self.page}:{self.line}"


def blocks(language: str) -> list[Block]:
    """Return all blocks of a language, page by page."""
    found = []
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        for match in FENCE.finditer(text):
            line = text[: match.start()].count("\n") + 1
            found.append(Block(str(path.relative_to(ROOT)), line, match[1], match[2]))
    return [block for block in found if block.language == language]


def run_alone(block: Block, folder: Path) -> str:
    """Run a block in a new process, in an empty folder, and return what it prints.

    The process comes from one that has imported what takes seconds, and nothing of normswap.
    """
    fresh = multiprocessing.get_context("forkserver")
    fresh.set_forkserver_preload(HEAVY)
    process = fresh.Process(target=_run, args=(block.text, str(block), str(folder)))
    process.start()
    process.join(120)
    if process.exitcode is None:
        process.kill()
    printed = (folder / ".printed").read_text(encoding="utf-8")
    assert process.exitcode == 0, f"exit {process.exitcode}\n{printed}"
    return printed


def assert_alike(now: str, said: str, tolerance: float) -> None:
    """Hold what is printed to what a page says; percentages may end elsewhere on another processor, but 0 is 0."""
    now, said = SECONDS.sub("N s", now), SECONDS.sub("N s", said)
    for ours, theirs in zip(PERCENT.findall(now), PERCENT.findall(said), strict=True):
        assert abs(float(ours) - float(theirs)) <= tolerance * (float(theirs) != 0)
    assert PERCENT.sub("%", now).split() == PERCENT.sub("%", said).split()


def _run(text: str, name: str, folder: str) -> None:
    os.chdir(folder)
    with open(".printed", "w", encoding="utf-8") as out, contextlib.redirect_stdout(out), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            exec(compile(text, name, "exec"), {"__name__": "__main__"})
        except BaseException:
            out.write(traceback.format_exc())
            raise SystemExit(1) from None
