"""Lay out rows of text in columns."""

from collections.abc import Sequence

from normswap.texts import plain


def table(rows: Sequence[Sequence[str]], *, header: Sequence[str]) -> str:
    """Return left-aligned columns two spaces apart, under a header and a rule."""
    every = [[plain(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in every) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in every]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
