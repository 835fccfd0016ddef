"""What was checked, and whether it holds."""

from dataclasses import dataclass
from typing import Any

from rich.table import Table

from normswap.tables import layout, table

HEADER = ("", "check", "found")
MARKS = {True: "ok", False: "FAILED", None: "n/a"}


@dataclass(frozen=True)
class Check:
    """One promise, and whether it holds.

    Attributes:
        name: What is promised.
        ok: Whether it holds; None where it does not apply to the network, or could not be judged.
        detail: What was found.
    """

    name: str
    ok: bool | None
    detail: str


@dataclass(frozen=True)
class Checks:
    """What was checked; true if everything that applies holds, and ``str(checks)`` is a table.

    Attributes:
        rows: One per check, in the order in which they ran.
    """

    rows: tuple[Check, ...]

    def __bool__(self) -> bool:
        """Whether no check failed."""
        return all(row.ok is not False for row in self.rows)

    def __str__(self) -> str:
        """Return the checks as a table for people."""
        return table(self._cells(), header=HEADER)

    def __rich__(self) -> Table:
        """Return the table as `rich` fits it to a terminal."""
        return layout(self._cells(), header=HEADER)

    def _cells(self) -> list[tuple[str, str, str]]:
        return [(MARKS[row.ok], row.name, row.detail) for row in self.rows]

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that do not hold."""
        return tuple(row for row in self.rows if row.ok is False)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON data."""
        return {"ok": bool(self), "checks": [{"name": r.name, "ok": r.ok, "detail": r.detail} for r in self.rows]}
