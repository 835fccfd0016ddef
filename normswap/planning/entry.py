"""A plan's entries: what happens to one norm or one convolution, and why."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal

from normswap.planning.choices import WS, Action, Affine, Role
from normswap.planning.schema import (
    chosen,
    count,
    flag,
    group_wish,
    must_hold,
    not_negative,
    number,
    one_of,
    optional,
    ruled,
    sizes,
    slices,
    text,
    texts,
)


@dataclass(frozen=True)
class Entry:
    """One layer of the network.

    Attributes:
        role: ``"norm"`` or ``"conv"``.
        name: Qualified name, as first registered; empty for the network itself.
        kind: Class name of the layer.
        action: What happens to it.
        reason: Why.
        aliases: Its other names.
        channels: Channels of a norm, output channels of a convolution.
        eps: Epsilon of the new norm, or of the standardization; None where a convolution stays plain.
        by_user: Whether it stays a norm or a plain convolution because the user's options say so.
    """

    role: ClassVar[Role]

    name: str = field(metadata=ruled(text))
    kind: str = field(metadata=ruled(text))
    action: Action = field(metadata=ruled(chosen(Action)))
    reason: str = field(metadata=ruled(text))
    aliases: tuple[str, ...] = field(default=(), metadata=ruled(texts))
    channels: int = field(default=0, metadata=ruled(lambda value: count(value, 0)))
    eps: float | None = field(default=None, metadata=ruled(optional(not_negative)))
    by_user: bool = field(default=False, metadata=ruled(flag))

    @property
    def changes(self) -> bool:
        """Whether the layer is replaced."""
        return self.action is not Action.KEEP

    @property
    def converts(self) -> bool:
        """Whether the layer is replaced by one of another kind; a frozen norm stays one."""
        return self.changes and self.action is not Action.FREEZE

    @property
    def flaw(self) -> str:
        """What keeps the entry from being applied: a value that its action needs or cannot have; else empty."""
        if not self.changes:
            return ""
        if not isinstance(self.eps, (int, float)):
            return f"{self.action.value!r} without an epsilon"
        return "" if self.channels else f"{self.action.value!r} of no channels"


@dataclass(frozen=True)
class NormEntry(Entry):
    """A BatchNorm-like layer.

    Attributes:
        fed_by: The first layers upstream that change values, eight of them at most; operators in angle brackets.
        shape: (N, C, *) shape of its smallest input in the trace; None if no forward pass reached it.
        groups_asked: Group count wanted, or ``"auto"``.
        groups: Group count used; None where it becomes a scale or stays.
        drift: How far a sample's own statistics can be expected to move the output of the matched norm, relative to
            the output's variation (`normswap.layers.matching.drift`): 0 moves nothing, 1 as much as samples differ.
            None where there are no statistics to tell.
        drift_before: The same without equalization; None where nothing was equalized or seen on images.
        not_equalized: Why the filters before a matched norm keep scale and sign, or how many of its channels' do not;
            empty where they are equalized (`normswap.layers.equalization`).
        scaled_by: Where several layers make its channels, or some are scaled and others not: layer, first channel and
            end of every slice that the layer's scales are for. Empty where they are those of the one layer before it.
        affine: Where the affine values of the new norm come from; None where it stays.
        per_position: Whether its statistics are those of each position, over the channels of a group alone.
        stepped: Whether it is called with (T, N, C, *): each step of each sample counts as a sample of its `shape`.
        then: Modules inside a norm subclass that keep running after the normalization, in order.
    """

    role: ClassVar[Role] = Role.NORM

    fed_by: tuple[str, ...] = field(default=(), metadata=ruled(texts))
    shape: tuple[int, ...] | None = field(default=None, metadata=ruled(optional(sizes)))
    groups_asked: int | Literal["auto"] | None = field(default=None, metadata=ruled(optional(group_wish)))
    groups: int | None = field(default=None, metadata=ruled(optional(count)))
    drift: float | None = field(default=None, metadata=ruled(optional(number)))
    drift_before: float | None = field(default=None, metadata=ruled(optional(number)))
    not_equalized: str = field(default="", metadata=ruled(text))
    scaled_by: tuple[tuple[str, int, int], ...] = field(default=(), metadata=ruled(slices))
    affine: Affine | None = field(default=None, metadata=ruled(optional(chosen(Affine))))
    per_position: bool = field(default=False, metadata=ruled(flag))
    stepped: bool = field(default=False, metadata=ruled(flag))
    then: tuple[str, ...] = field(default=(), metadata=ruled(texts))

    @property
    def is_turned(self) -> bool:
        """Whether its input has the channels on another axis than 1, where GroupNorm takes them."""
        return self.shape is not None and self.channels in self.shape and self.shape[1:2] != (self.channels,)

    @property
    def flaw(self) -> str:
        """What keeps the entry from being applied, else empty."""
        if self.action is Action.STANDARDIZE:
            return f"{self.action.value!r} is for convolutions"
        if self.changes and (self.groups is None) == (self.action is Action.GROUP_NORM):
            return f"{self.action.value!r} with {self.groups} groups"
        if self.groups is not None and (not self.channels or self.channels % self.groups):
            return f"{self.groups} groups do not divide {self.channels} channels"
        if self.shape is not None and self.erases(self.shape):
            return f"{self.groups} groups of one value each, which normalizing erases"
        return super().flaw

    def erases(self, shape: tuple[int, ...]) -> bool:
        """Tell whether each group of an input, (N, C, *), is a single value, of which normalizing leaves nothing."""
        return self.groups == self.channels and (self.per_position or math.prod(shape[2:]) == 1)


@dataclass(frozen=True)
class ConvEntry(Entry):
    """A convolution.

    Attributes:
        feeds: The first layers downstream that change values, eight of them at most; operators in angle brackets.
        ws: Form of its weight standardization, adaptive or standard; None where it stays plain.
    """

    role: ClassVar[Role] = Role.CONV

    feeds: tuple[str, ...] = field(default=(), metadata=ruled(texts))
    ws: WS | None = field(default=None, metadata=ruled(optional(one_of(WS.ADAPTIVE, WS.STANDARD))))

    @property
    def flaw(self) -> str:
        """What keeps the entry from being applied, else empty."""
        if self.action in (Action.GROUP_NORM, Action.SCALE, Action.FREEZE):
            return f"{self.action.value!r} is for norms"
        if (self.ws is None) == (self.action is Action.STANDARDIZE):
            return f"{self.action.value!r} with the form {self.ws!r}"
        return super().flaw


ENTRIES: dict[str, type[NormEntry] | type[ConvEntry]] = {Role.NORM: NormEntry, Role.CONV: ConvEntry}
ENUMS = {"action": Action, "affine": Affine, "ws": WS}


def entry_from(data: Mapping[str, Any]) -> NormEntry | ConvEntry:
    """Return the entry that JSON data describes.

    Raises:
        ValueError: A field is unknown, or holds what it may not, or the fields do not agree with each other.
    """
    where = f"the layer {data['name']!r}" if text(data.get("name")) else "a layer"
    role = data["role"]
    if not isinstance(role, str) or role not in ENTRIES:
        raise ValueError(f"{where}: role cannot be {role!r:.60}")
    kind, own = ENTRIES[role], {key: value for key, value in data.items() if key != "role"}
    must_hold(own, where, *ENTRIES.values())
    if strange := [key for key in own if key not in {declared.name for declared in fields(kind)}]:
        raise ValueError(f"{where}: a {role} has no {strange[0]}")
    values: dict[str, Any] = {key: _tuples(value) for key, value in own.items()}
    values |= {key: enum(values[key]) for key, enum in ENUMS.items() if values.get(key) is not None}
    entry = kind(**values)
    if entry.flaw:
        raise ValueError(f"{where}: {entry.flaw}")
    return entry


def renamed(entry: NormEntry | ConvEntry, rename: Callable[[str], str]) -> NormEntry | ConvEntry:
    """Return an entry by other names, without the slices of layers before it: these have others, too."""
    named = replace(entry, name=rename(entry.name), aliases=tuple(map(rename, entry.aliases)))
    return replace(named, scaled_by=()) if isinstance(named, NormEntry) else named


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
