"""The plan: an immutable record of what happens to every norm and every convolution, and why."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from os import PathLike
from pathlib import Path
from typing import Any, Self

from normswap.errors import PlanMismatch
from normswap.planning.options import Options
from normswap.planning.schema import must_be_entry, must_be_inputs, must_be_options
from normswap.sources.untrusted_json import read_json

SCHEMA = 1
"""Version of the JSON form; a newer one is refused."""


class Action(StrEnum):
    """What happens to a layer."""

    GROUP_NORM = "group_norm"
    SCALE = "scale"  # a norm that sees one value a sample
    STANDARDIZE = "standardize"
    KEEP = "keep"


@dataclass(frozen=True)
class Entry:
    """One layer of the network.

    Attributes:
        name: Qualified name, as first registered; `aliases` are its other names.
        kind: Class name of the layer.
        role: ``"norm"`` or ``"conv"``.
        action: What happens to it.
        reason: Why.
        fed_by: For a norm, the first layers or operators upstream that change values.
        feeds: For a convolution, the first ones downstream.
        channels: Channels of a norm, output channels of a convolution.
        shape: (N, C, *) shape of a norm's input in the trace; None if it was not reached.
        groups_asked: Group count wanted, or ``"auto"``; `groups` the one used.
        eps: Epsilon of the new norm, or of the standardization.
        drift: How far a sample's own statistics can be expected to move a matched norm's output, relative to the
            output's variation (`normswap.layers.matching.drift`); None where there are no statistics to tell.
        affine: ``"match"`` or ``"copy"``: where the affine values of the new norm come from.
        then: Modules inside a norm subclass that keep running after the normalization.
        ws: ``"adaptive"`` or ``"standard"``.
        by_user: Left alone because an include or exclude pattern says so.
    """

    name: str
    kind: str
    role: str
    action: Action
    reason: str
    aliases: tuple[str, ...] = ()
    fed_by: tuple[str, ...] = ()
    feeds: tuple[str, ...] = ()
    channels: int = 0
    shape: tuple[int, ...] | None = None
    groups_asked: int | str | None = None
    groups: int | None = None
    eps: float | None = None
    drift: float | None = None
    affine: str | None = None
    then: tuple[str, ...] = ()
    ws: str | None = None
    by_user: bool = False

    @property
    def changes(self) -> bool:
        """Whether the layer is replaced."""
        return self.action is not Action.KEEP


@dataclass(frozen=True)
class Plan:
    """What a conversion does to every norm and convolution of a network; ``str(plan)`` is a table."""

    options: Options
    entries: tuple[Entry, ...]
    warnings: tuple[str, ...] = ()
    inputs: Any = None

    @property
    def norms(self) -> tuple[Entry, ...]:
        """Entries of the BatchNorm-like layers."""
        return tuple(entry for entry in self.entries if entry.role == "norm")

    @property
    def convs(self) -> tuple[Entry, ...]:
        """Entries of the convolutions."""
        return tuple(entry for entry in self.entries if entry.role == "conv")

    @property
    def changes(self) -> tuple[Entry, ...]:
        """Entries of the layers that are replaced."""
        return tuple(entry for entry in self.entries if entry.changes)

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
        entries = [{k: v for k, v in _plain(vars(e)).items() if v not in (None, [], False)} for e in self.entries]
        return {
            "schema": SCHEMA,
            "options": _plain(vars(self.options)),
            "entries": entries,
            "warnings": list(self.warnings),
            "inputs": self.inputs,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Return the plan that `to_dict` wrote.

        Raises:
            PlanMismatch: The data is no plan, or one of a newer schema.
        """
        _must_be_readable(data.get("schema") if isinstance(data, Mapping) else None, "this plan")
        try:
            must_be_options(data["options"])
            for entry in data["entries"]:
                must_be_entry(entry)
            must_be_inputs(data["inputs"])
            options = Options(**_tuples(data["options"]))
            entries = tuple(Entry(**_tuples(e) | {"action": Action(e["action"])}) for e in data["entries"])
            return cls(options, entries, tuple(map(str, data["warnings"])), data["inputs"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"{type(error).__name__}: {error}"
            raise PlanMismatch(f"this is not a plan ({what}); convert the model again") from error

    def with_entries(self, entries: Mapping[str, Entry]) -> Self:
        """Return the plan with some entries replaced, by name."""
        return replace(self, entries=tuple(entries.get(entry.name, entry) for entry in self.entries))

    def __deepcopy__(self, _memo: object) -> Self:
        """Return the plan itself: it never changes, and every copy of a converted network carries it."""
        return self

    def __str__(self) -> str:
        """Return the plan as a table for people."""
        from normswap.planning.report import plan_table

        return plan_table(self)


def _must_be_readable(schema: Any, what: str) -> None:
    if type(schema) is not int or not 1 <= schema <= SCHEMA:
        readable = f"this normswap reads up to {SCHEMA}"
        raise PlanMismatch(f"{what} has schema {schema!r:.60}, {readable}; upgrade normswap or convert again")


def _plain(data: dict[str, Any]) -> dict[str, Any]:
    return {key: _swapped(value, tuple, list) for key, value in data.items()}


def _tuples(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _swapped(value, list, tuple) for key, value in data.items()}


def _swapped(value: Any, kind: type, other: Callable[[Iterable[Any]], Any]) -> Any:
    """Turn nested tuples into lists for JSON, or back."""
    items: Any = value
    return other(_swapped(item, kind, other) for item in items) if isinstance(value, kind) else value


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
    _must_be_readable(block.get("schema", SCHEMA), f"{where}:")
    try:
        return Plan.from_dict(block.get("plan"))  # type: ignore[arg-type]
    except PlanMismatch as error:
        raise PlanMismatch(f"{where}: {error}") from error
