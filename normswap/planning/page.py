"""A plan as a page to look at: one HTML file that needs no network, with a table to sort and a chart of the drift."""

import base64
import hashlib
import re
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING

from normswap.planning.choices import Role
from normswap.planning.entry import NormEntry
from normswap.planning.report import becomes, summary
from normswap.texts import plain
from normswap.version import __version__

if TYPE_CHECKING:
    from normswap.conversion.checks import Check
    from normswap.planning.entry import ConvEntry
    from normswap.planning.plan import Plan

COLUMNS = {
    "#": True, "layer": False, "is": False, "becomes": False,
    "channels": True, "drift before": True, "drift after": True, "why": False,
}  # fmt: skip
"""Headings, and whether numbers stand below them."""

LARGEST_FIRST = ("channels", "drift before", "drift after")
MARKS = {True: ("good", "ok"), False: ("bad", "FAILED"), None: ("", "n/a")}


def plan_page(plan: "Plan", *, title: str = "", command: str = "", checks: Iterable["Check"] = ()) -> str:
    """Return an HTML page of a plan.

    No text in it can become markup: all of it is escaped, and the page forbids every script but its own.

    Args:
        plan: The plan.
        title: What was converted.
        command: How, as it was typed.
        checks: What was checked afterwards.
    """
    drifting = [norm for norm in plan.norms if norm.drift is not None]
    style, script = (files("normswap.planning").joinpath(f"page.{kind}").read_text("utf-8") for kind in ("css", "js"))
    parts = {
        "title": _shown(title or "A network"),
        "version": _shown(__version__),
        "command": f"<pre>{_shown(command)}</pre>" if command else "",
        "summary": _items(summary(plan.entries, ())),
        "warnings": f'<ul class="warnings">{_items(plan.warnings)}</ul>' if plan.warnings else "",
        "options": "".join(
            f"<dt>{_shown(key)}</dt><dd>{_shown(str(value))}</dd>" for key, value in plan.to_dict()["options"].items()
        ),
        "checks": _checks(tuple(checks)),
        "chart": _chart(drifting),
        "sorts": "".join(map(_sorts, range(len(COLUMNS)), COLUMNS)),
        "head": "".join(map(_head, COLUMNS)),
        "rows": "\n".join(_row(place, entry) for place, entry in enumerate(plan.entries, 1)),
        "style": style,
        "script": script,
        "style_hash": _digest(style),
        "script_hash": _digest(script),
    }
    template = files("normswap.planning").joinpath("page.html").read_text("utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _shown(text: str) -> str:
    return escape(plain(text))


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _items(lines: Iterable[str]) -> str:
    return "".join(f"<li>{_shown(line)}</li>" for line in lines)


def _checks(checks: Sequence["Check"]) -> str:
    if not checks:
        return ""
    rows = ""
    for check in checks:
        kind, mark = MARKS[check.ok]
        cells = f'<td class="mark {kind}">{mark}</td><td>{_shown(check.name)}</td>'
        rows += f'<tr>{cells}<td class="wraps">{_shown(check.detail)}</td></tr>'
    return (
        '<section aria-labelledby="checks"><h2 id="checks">Checks</h2><table><thead><tr><th scope="col">holds</th>'
        f'<th scope="col">check</th><th scope="col">found</th></tr></thead><tbody>{rows}</tbody></table></section>'
    )


def _chart(drifting: Sequence[NormEntry]) -> str:
    if not drifting:
        return ""
    before = '<span class="before"><i></i>filters as they were</span>'
    before = before if any(norm.drift_before is not None for norm in drifting) else ""
    return f"""<section aria-labelledby="drift">
<h2 id="drift">Where function is lost</h2>
<p>Drift is how far a sample's own statistics can be expected to move a norm's output, relative to how much samples
differ there. At 0 they move nothing, at 0.8 four fifths as much as samples differ, at 1 (dashed) as much.</p>
<p class="key">{before}<span class="after"><i></i>as converted</span></p>
<svg id="chart" role="application" tabindex="0" aria-describedby="told"
aria-label="Drift of {len(drifting)} norms in the order of the network; arrow keys walk from norm to norm"></svg>
<p id="told" aria-live="polite" class="quiet">Point at a norm, or walk with the arrow keys, to see its name; a click or
Enter goes to its row.</p>
</section>"""


def _sorts(place: int, heading: str) -> str:
    ways = "-+" if heading in LARGEST_FIRST else "+"
    names = {"+": "smallest first" if COLUMNS[heading] else "A to Z", "-": "largest first"}
    label = "order of the network" if heading == "#" else heading
    return "".join(
        f'<option value="{place}{way}">{label}{"" if heading == "#" else f", {names[way]}"}</option>' for way in ways
    )


def _head(heading: str) -> str:
    kind = ' class="number"' if COLUMNS[heading] else ""
    first = ' data-first="down"' if heading in LARGEST_FIRST else ""
    return f'<th scope="col" aria-sort="none"{kind}{first}><button type="button">{heading}</button></th>'


def _row(place: int, entry: "NormEntry | ConvEntry") -> str:
    norm = entry if isinstance(entry, NormEntry) else None
    drift, before = (None, None) if norm is None else (norm.drift, norm.drift_before)
    is_a = f"{'norm' if entry.role == Role.NORM else 'conv'} {'changed' if entry.changes else 'left'}"
    data = "".join(
        f' data-{key}="{float(value):.6g}"'
        for key, value in (("drift", drift), ("before", before))
        if value is not None
    )
    name = ", ".join(part or "(root)" for part in (entry.name, *entry.aliases))
    why = entry.reason + (f"; not equalized: {norm.not_equalized}" if norm is not None and norm.not_equalized else "")
    cells = (
        f'<td class="number place">{place}</td>',
        f'<td class="name">{_shown(name)}</td>',
        f'<td data-label="is">{_shown(entry.kind)}</td>',
        f'<td data-label="becomes"{"" if entry.changes else " class=left"}>{_shown(becomes(entry))}</td>',
        f'<td class="number" data-label="channels">{entry.channels or ""}</td>',
        _number("drift before", before),
        _number("drift after", drift),
        f'<td class="why">{_shown(why)}</td>',
    )
    return f'<tr data-is="{is_a}"{data}>{"".join(cells)}</tr>'


def _number(label: str, value: float | None) -> str:
    if value is None:
        return '<td class="number"></td>'
    return f'<td class="number" data-label="{label}" data-value="{value:.6g}">{value:.2f}</td>'
