"""The plan: an immutable record of what happens to every norm and every convolution, and why."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rich.console import Group

from normswap.errors import PlanMismatch
from normswap.planning.choices import Keep
from normswap.planning.entry import ConvEntry, Entry, NormEntry, entry_from
from normswap.planning.options import Options
from normswap.planning.page import plan_page
from normswap.planning.report import made_up_inputs, plan_layout, plan_table
from normswap.planning.schema import SCHEMA, must_be_inputs, must_hold, packed, unpacked, unreadable
from normswap.sources.untrusted_json import read_json
from normswap.writing import must_be_writable

if TYPE_CHECKING:
    from normswap.conversion.checks import Checks


@dataclass(frozen=True)
class Plan:
    """What a conversion does to every norm and convolution of a network; ``str(plan)`` is a table.

    Attributes:
        options: What the user asked for.
        entries: One for every BatchNorm-like layer and every convolution, in the order of registration.
        warnings: What the conversion does not change and may surprise, a line each.
        inputs: Shapes and types of the example input that the network was traced with, as JSON data; None where a
            part of it was neither tensor nor container.
        made_up: Whether nobody gave that example.
        scales: Factors by which the filters of a layer are multiplied, one per output channel, by layer.
    """

    options: Options
    entries: tuple[NormEntry | ConvEntry, ...]
    warnings: tuple[str, ...] = ()
    inputs: Any = None
    scales: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    made_up: bool = False

    @property
    def norms(self) -> tuple[NormEntry, ...]:
        """Entries of the BatchNorm-like layers."""
        return tuple(entry for entry in self.entries if isinstance(entry, NormEntry))

    @property
    def convs(self) -> tuple[ConvEntry, ...]:
        """Entries of the convolutions."""
        return tuple(entry for entry in self.entries if isinstance(entry, ConvEntry))

    @property
    def changes(self) -> tuple[NormEntry | ConvEntry, ...]:
        """Entries of the layers that are replaced."""
        return tuple(entry for entry in self.entries if entry.changes)

    @property
    def converts(self) -> bool:
        """Whether a layer is replaced by one of another kind, or frozen because ``to="frozen"`` asks for it."""
        return any(e.converts or (e.changes and self.options.freezes(e.name)) for e in self.entries)

    @property
    def input_size(self) -> tuple[int, ...]:
        """Size of one sample of the first tensor the network was traced with, (C, *); empty where there is none."""
        spec = self.inputs
        while isinstance(spec, dict) and "tensor" not in spec:
            items = next(iter(spec.values()), None)
            spec = next(iter(items.values() if isinstance(items, dict) else items or ()), None)
        return tuple(spec["tensor"][1:]) if isinstance(spec, dict) else ()

    def to_dict(self) -> dict[str, Any]:
        """Return JSON data from which `from_dict` makes an equal plan."""
        return {
            "schema": SCHEMA,
            "options": _fields(self.options),
            "entries": [_sparse(entry) for entry in self.entries],
            "warnings": list(self.warnings),
            "inputs": self.inputs,
            **({"made_up": True} if self.made_up else {}),
            **({"scales": {name: packed(values) for name, values in self.scales.items()}} if self.scales else {}),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Return the plan that `to_dict` wrote.

        Raises:
            PlanMismatch: The data is no plan, or one of a newer schema.
        """
        if newer := unreadable(data.get("schema") if isinstance(data, Mapping) else None):
            raise PlanMismatch(f"this plan {newer}")
        try:
            must_hold(data["options"], "the options", Options)
            must_be_inputs(data["inputs"])
            asked = {"keep": Keep.LIVE} | data["options"]  # plans that say nothing of it are older than frozen norms
            options = Options(**{key: _swapped(value, list, tuple) for key, value in asked.items()})
            entries = tuple(map(entry_from, data["entries"]))
            scales = {str(name): unpacked(values) for name, values in data.get("scales", {}).items()}
            made_up = data.get("made_up", False) is True
            return cls(options, entries, tuple(map(str, data["warnings"])), data["inputs"], scales, made_up)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"{type(error).__name__}: {error}"
            raise PlanMismatch(f"this is not a plan ({what}); convert the model again") from error

    def report(
        self, path: str | PathLike[str], *, title: str = "", command: str = "", checks: "Checks | None" = None
    ) -> Path:
        """Write the plan as a page to look at: one HTML file with a table to sort and filter, and a chart of the drift.

        >>> normswap.plan_of(converted).report("plan.html", checks=normswap.check(converted))  # doctest: +SKIP

        Args:
            path: The file, in a folder that exists; it is replaced.
            title: What was converted, for the heading.
            command: How, for whoever wants to do it again.
            checks: What `check` found.

        Returns:
            The path of the file.

        Raises:
            InvalidOption: The file cannot be written.
        """
        target = Path(path)
        must_be_writable(target, "report")
        rows = () if checks is None else checks.rows
        target.write_text(plan_page(self, title=title, command=command, checks=rows), encoding="utf-8")
        return target

    def with_entries(self, entries: Mapping[str, NormEntry | ConvEntry]) -> Self:
        """Return the plan with some entries replaced, by name."""
        return replace(self, entries=tuple(entries.get(entry.name, entry) for entry in self.entries))

    def __deepcopy__(self, _memo: object) -> Self:
        """Return the plan itself: it never changes, and every copy of a converted network carries it."""
        return self

    def __str__(self) -> str:
        """Return the plan as a table for people."""
        return "\n".join([plan_table(self.entries, self.warnings), *made_up_inputs(self.inputs, self.made_up)])

    def __rich__(self) -> Group:
        """Return the table as `rich` fits it to a terminal."""
        return plan_layout(self.entries, self.warnings, made_up_inputs(self.inputs, self.made_up))


def as_plan(plan: Plan | str | PathLike[str]) -> Plan:
    """Return the plan itself, or the one in a converted checkpoint's ``config.json``.

    Raises:
        PlanMismatch: The file holds no plan.
    """
    if isinstance(plan, Plan):
        return plan
    try:
        data = read_json(Path(plan))
    except (OSError, ValueError) as error:
        raise PlanMismatch(
            f"{plan}: no plan can be read ({error}); pass a converted checkpoint's config.json"
        ) from error
    if not isinstance(data, dict) or not isinstance(data.get("normswap"), dict):
        raise PlanMismatch(f"{plan}: holds no normswap plan; pass a converted checkpoint's config.json")
    return plan_in(data["normswap"], str(plan))


def plan_in(block: Mapping[str, Any], where: str) -> Plan:
    """Return the plan in a configuration's ``normswap`` block.

    Raises:
        PlanMismatch: The block has a newer schema, or holds no plan; the message begins with `where`.
    """
    if newer := unreadable(block.get("schema", SCHEMA)):
        raise PlanMismatch(f"{where}: {newer}")
    try:
        return Plan.from_dict(block.get("plan"))  # type: ignore[arg-type]
    except PlanMismatch as error:
        raise PlanMismatch(f"{where}: {error}") from error


def _fields(data: Options | Entry) -> dict[str, Any]:
    """Return a dataclass' fields as JSON data."""
    return {field.name: _swapped(getattr(data, field.name), tuple, list) for field in fields(data)}


def _sparse(entry: NormEntry | ConvEntry) -> dict[str, Any]:
    """Return an entry as JSON data, without the fields that say nothing."""
    values = {"name": entry.name, "kind": entry.kind, "role": entry.role, **_fields(entry)}
    return {key: value for key, value in values.items() if value is not None and value is not False and value != []}


def _swapped(value: Any, kind: type, other: Callable[[Iterable[Any]], Any]) -> Any:
    """Turn nested tuples into lists for JSON, or back."""
    items: Any = value
    return other(_swapped(item, kind, other) for item in items) if isinstance(value, kind) else value
