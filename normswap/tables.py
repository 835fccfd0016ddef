"""Lay out rows of text in columns: whole in plain text, and as wide as the terminal where there is one."""

import io
from collections.abc import Collection, Sequence

from rich.box import Box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from normswap.texts import plain, plain_lines

RULE = Box("    \n    \n----\n    \n    \n    \n    \n    \n", ascii=True)
"""Nothing but a line of dashes below the header."""

LEAST, WIDEST = 12, 2**20
"""Letters that are left of a name that is shortened, and the width in which nothing is shortened or wrapped."""


class Name:
    """A name, of which the middle is left out where there is no room: beginning and end tell names apart."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> RenderResult:
        """Yield as much of the name as fits."""
        yield Text(shortened(self.text, options.max_width), overflow="crop", no_wrap=True)

    def __rich_measure__(self, _: Console, options: ConsoleOptions) -> Measurement:
        """Return between which widths the name can be shown."""
        whole = Text(self.text).cell_len
        return Measurement(min(LEAST, whole), min(whole, options.max_width))


def shortened(text: str, width: int) -> str:
    """Return a text without its middle, where it is wider than that.

    >>> shortened("features.denseblock1.denselayer1", 16)
    'features…elayer1'
    """
    if Text(text).cell_len <= width:
        return text
    front = width // 2
    return f"{text[:front]}…{text[len(text) - (width - front - 1) :]}" if width > 2 else text[:width]


def layout(rows: Sequence[Sequence[str]], *, header: Sequence[str], names: Collection[str] = ()) -> Table:
    """Return left-aligned columns two spaces apart, under a header and a rule, for `rich` to print.

    Args:
        rows: Cells; what is in them is data and no markup.
        header: Titles of the columns; the last one wraps.
        names: Titles of the columns whose cells may be shortened.
    """
    grid = Table(box=RULE, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    last = len(header) - 1
    for place, title in enumerate(header):
        grid.add_column(Text(plain(title)), no_wrap=place != last and title not in names, overflow="fold")
    for row in rows:
        cells = [plain(cell) for cell in row]
        grid.add_row(*(Name(c) if title in names else Text(c) for title, c in zip(header, cells, strict=True)))
    return grid


def table(rows: Sequence[Sequence[str]], *, header: Sequence[str]) -> str:
    """Return the same columns as text of one line per row, whatever the terminal's width.

    Args:
        rows: Cells.
        header: Titles of the columns.
    """
    return rendered(layout(rows, header=header), WIDEST)


def stacked(*parts: Table | str) -> Group:
    """Return tables and lines below each other; lines wrap between words, and what is in them is data."""
    return Group(*(part if isinstance(part, Table) else Text(plain_lines(part)) for part in parts))


def rendered(shown: RenderableType, width: int) -> str:
    """Return what `rich` prints in so many columns, as text without colours."""
    printed = io.StringIO()
    plainly = {"color_system": None, "force_terminal": False, "force_jupyter": False, "legacy_windows": False}
    Console(file=printed, width=width, **plainly).print(shown)  # type: ignore[arg-type]
    return "\n".join(line.rstrip() for line in printed.getvalue().rstrip("\n").split("\n"))
