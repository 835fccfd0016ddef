"""Tables and counts for people; no torch here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from normswap.conversion.checks import Checks
    from normswap.planning.plan import Entry, Plan


def table(rows: Sequence[Sequence[str]], *, header: Sequence[str]) -> str:
    """Return left-aligned columns two spaces apart, under a header and a rule."""
    every = [header, *rows]
    widths = [max(len(row[column]) for row in every) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in every]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def plan_table(plan: Plan) -> str:
    """Return one row a layer, the totals and the warnings."""
    rows = [(e.name or "(root)", e.kind, _action(e), _drift(e), e.reason) for e in plan.entries]
    text = table(rows, header=("layer", "is", "becomes", "drift", "why"))
    return "\n".join([text, "", *summary(plan)])


def summary(plan: Plan) -> list[str]:
    """Return the totals and the warnings, a line each."""
    groups = Counter(entry.groups for entry in plan.norms if entry.action == "group_norm")
    scales = sum(entry.action == "scale" for entry in plan.norms)
    counts = ", ".join(f"{n} of {g} group{'s' if g != 1 else ''}" for g, n in groups.most_common())
    forms = Counter(entry.ws for entry in plan.convs if entry.changes)
    kinds = ", ".join(f"{n} {form}" for form, n in sorted(forms.items(), key=str))
    norms, convs = sum(groups.values()), sum(forms.values())
    return [
        f"{norms} of {len(plan.norms)} norms become GroupNorm{f': {counts}' if counts else ''}",
        *([f"{scales} norms that see one value a sample become ChannelScale"] if scales else []),
        f"{convs} of {len(plan.convs)} convolutions are weight-standardized{f': {kinds}' if kinds else ''}",
        *(f"left: {n} x {reason}" for reason, n in _left(plan).most_common()),
        *(f"warning: {warning}" for warning in plan.warnings),
    ]


def checks_table(checks: Checks) -> str:
    """Return one row a check."""
    marks = {True: "ok", False: "FAILED", None: "n/a"}
    return table([(marks[row.ok], row.name, row.detail) for row in checks.rows], header=("", "check", "found"))


def _left(plan: Plan) -> Counter[str]:
    """Count layers left alone by reason; names in reasons are left out so that they add up."""
    return Counter(_general(entry) for entry in plan.entries if not entry.changes)


def _general(entry: Entry) -> str:
    reason = entry.reason
    for name in sorted((*entry.feeds, *entry.fed_by), key=len, reverse=True):
        if not name.startswith("<") and name:
            reason = reason.replace(name, "another layer")
    return f"{entry.role}: {reason}"


def _drift(entry: Entry) -> str:
    return "" if entry.drift is None else f"{entry.drift:.2f}"


def _action(entry: Entry) -> str:
    if not entry.changes:
        return "-"
    if entry.action == "scale":
        return "ChannelScale"
    if entry.role == "norm":
        act = " + " + ", ".join(entry.then) if entry.then else ""
        return f"GroupNorm({entry.groups}){act}"
    return f"WS {entry.ws}"
