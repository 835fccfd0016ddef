"""Tables and counts of plans, for people."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group

from normswap.planning.choices import Action, Affine
from normswap.planning.entry import ConvEntry, NormEntry
from normswap.tables import layout, stacked, table
from normswap.texts import plain

Entries = Sequence[NormEntry | ConvEntry]
HEADER = ("layer", "is", "becomes", "drift", "why")


def plan_table(entries: Entries, warnings: Iterable[str]) -> str:
    """Return one row per layer, the totals and the warnings."""
    return "\n".join([table(_rows(entries), header=HEADER), "", *summary(entries, warnings)])


def plan_layout(entries: Entries, warnings: Iterable[str], more: Iterable[str]) -> Group:
    """Return the same and more lines for a terminal: long names are shortened, reasons wrapped."""
    grid = layout(_rows(entries), header=HEADER, names=("layer", "is"))
    return stacked(grid, "", *summary(entries, warnings), *more)


def _rows(entries: Entries) -> list[tuple[str, ...]]:
    return [(e.name or "(root)", e.kind, becomes(e), _drift(e), e.reason) for e in entries]


def summary(entries: Entries, warnings: Iterable[str]) -> list[str]:
    """Return the totals and the warnings, a line each."""
    norms = [entry for entry in entries if isinstance(entry, NormEntry)]
    convs = [entry for entry in entries if isinstance(entry, ConvEntry)]
    groups = Counter(entry.groups for entry in norms if entry.action is Action.GROUP_NORM)
    scales = sum(entry.action is Action.SCALE for entry in norms)
    counts = ", ".join(f"{n} of {g} group{'s' if g != 1 else ''}" for g, n in groups.most_common())
    forms = Counter(entry.ws for entry in convs if entry.changes)
    kinds = ", ".join(f"{n} {form}" for form, n in sorted(forms.items(), key=str))
    matched = [entry for entry in norms if entry.changes and entry.affine is Affine.MATCH]
    equalized = sum(entry.drift_before is not None and not entry.not_equalized for entry in matched)
    frozen = [entry.by_user for entry in norms if entry.action is Action.FREEZE]
    grouped = bool(groups) or all(frozen)
    left = Counter(_general(entry) for entry in entries if not entry.changes)
    lines = [
        *(
            [f"{groups.total()} of {len(norms)} norms become GroupNorm{f': {counts}' if counts else ''}"]
            if grouped
            else []
        ),
        *([f"{scales} norms that see one value per sample become ChannelScale"] if scales else []),
        *([f"{frozen.count(False)} of {len(norms)} norms become FrozenBatchNorm"] if not all(frozen) else []),
        *([f"{sum(frozen)} norms that were kept are frozen: their statistics stay as they are"] if any(frozen) else []),
        *([f"{equalized} of {len(matched)} trained norms are equalized"] if equalized else []),
        f"{forms.total()} of {len(convs)} convolutions are weight-standardized{f': {kinds}' if kinds else ''}",
        *(f"left: {n} x {reason}" for reason, n in left.most_common()),
        *(f"warning: {warning}" for warning in warnings),
    ]
    return list(map(plain, lines))


def made_up_inputs(inputs: Any, made_up: bool) -> list[str]:
    """Return a line that says what the network was called with where nobody said with what, else none."""
    shapes = list(_shapes(inputs))
    return [f"made up: an input of {', '.join(shapes)}; pass example_input= (--input) to trace another"] * made_up


def _shapes(spec: Any) -> Iterator[str]:
    if isinstance(spec, Mapping) and "tensor" in spec:
        kind = "" if str(spec.get("dtype")).startswith("float") else f" {spec.get('dtype')}"
        yield f"({', '.join(map(str, spec['tensor']))}){kind}"
    elif isinstance(spec, Mapping):
        for item in spec.values():
            yield from _shapes(item)
    elif isinstance(spec, (list, tuple)):
        for item in spec:
            yield from _shapes(item)
    else:
        yield "what is no tensor"


def _general(entry: NormEntry | ConvEntry) -> str:
    """Return role and reason without the names in it, so that layers left for one reason add up."""
    reason = entry.reason
    for name in sorted(entry.fed_by if isinstance(entry, NormEntry) else entry.feeds, key=len, reverse=True):
        if not name.startswith("<") and name:
            reason = reason.replace(name, "another layer")
    return f"{entry.role}: {reason}"


def _drift(entry: NormEntry | ConvEntry) -> str:
    if not isinstance(entry, NormEntry) or entry.drift is None:
        return ""
    before = "" if entry.drift_before is None else f"{entry.drift_before:.2f} → "
    return f"{before}{entry.drift:.2f}"


def becomes(entry: NormEntry | ConvEntry) -> str:
    """Return what a layer becomes, in a word or two; a dash where it stays."""
    if not entry.changes:
        return "-"
    if isinstance(entry, ConvEntry):
        return f"WS {entry.ws}"
    if entry.action is Action.SCALE:
        return "ChannelScale"
    if entry.action is Action.FREEZE:
        return "FrozenBatchNorm"
    kind = "PositionNorm" if entry.per_position else "GroupNorm"
    return f"{kind}({entry.groups})" + (f" + {', '.join(entry.then)}" if entry.then else "")
