"""What was checked, and whether it holds."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Check:
    """One promise: `ok` is None where it does not apply to the network."""

    name: str
    ok: bool | None
    detail: str


@dataclass(frozen=True)
class Checks:
    """What was checked; true if everything that applies holds, and ``str(checks)`` is a table."""

    rows: tuple[Check, ...]

    def __bool__(self) -> bool:
        """Whether no check failed."""
        return all(row.ok is not False for row in self.rows)

    def __str__(self) -> str:
        """Return the checks as a table for people."""
        from normswap.planning.report import checks_table

        return checks_table(self)

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that do not hold."""
        return tuple(row for row in self.rows if row.ok is False)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON data."""
        return {"ok": bool(self), "checks": [{"name": r.name, "ok": r.ok, "detail": r.detail} for r in self.rows]}
