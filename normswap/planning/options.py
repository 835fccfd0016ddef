"""What a user can ask of a conversion, checked before anything is looked at."""

import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Any, Literal, Self, TypedDict

from normswap.errors import InvalidOption
from normswap.planning.choices import WS, Affine, Keep, Over, Role, To
from normswap.planning.groups import num_groups_for
from normswap.planning.schema import (
    chosen,
    count,
    flag,
    group_wish,
    number,
    optional,
    ruled,
    text,
    texts,
)
from normswap.texts import did_you_mean

SHRINK, AUTO_SHRINK = {False: 0.5, True: 4.0}, {False: 1.5, True: 60.0}
"""What measured best where the group count is given, and where it is chosen per layer; behind filters that are as they
were, and behind equalized ones."""

OVERRIDABLE = {"groups": Role.NORM, "group_size": Role.NORM, "to": Role.NORM, "over": Role.NORM, "ws": Role.CONV}
"""Options that overrides set, by the layers they are for."""


CHOICES: dict[str, type[StrEnum]] = {"to": To, "over": Over, "ws": WS, "affine": Affine, "keep": Keep}


class Wishes(TypedDict, total=False):
    """The options of `normswap.convert` and `normswap.inspect`, as they are passed by keyword."""

    groups: int | str
    group_size: int | None
    to: str
    over: str
    ws: str
    affine: str
    shrink: float | None
    equalize: bool
    keep: str
    include: Iterable[str]
    exclude: Iterable[str]
    overrides: Mapping[str, Mapping[str, int | str]]


def _override(row: Any) -> bool:
    return isinstance(row, (list, tuple)) and len(row) == 3 and texts(row[:2]) and (text(row[2]) or count(row[2]))


def _overrides(rows: Any) -> bool:
    return isinstance(rows, (list, tuple)) and all(map(_override, rows))


@dataclass(frozen=True)
class Options:
    """What the user asked for.

    Attributes:
        groups: Largest group count, or ``"auto"``: per layer the one whose statistics move the output least.
        group_size: Channels per group instead of `groups`.
        to: What norms become.
        over: Over what the norms' statistics are taken.
        ws: Which weight standardization the convolutions get.
        affine: Where the affine values come from.
        shrink: How far a matched norm draws a sample's variance towards the running one; None for what measured best.
        equalize: Whether filters before matched norms get the scales and signs with which GroupNorm moves least.
        keep: How the norms go on that the patterns leave alone.
        include: Patterns of names of layers, or of what holds them; only these are touched. Empty for all.
        exclude: Patterns of layers, or of what holds them, to leave alone.
        overrides: (pattern, option, value) rows: other options for some layers.
    """

    groups: int | Literal["auto"] = field(default=32, metadata=ruled(group_wish))
    group_size: int | None = field(default=None, metadata=ruled(optional(count)))
    to: To = field(default=To.GROUP, metadata=ruled(text))
    over: Over = field(default=Over.SAMPLE, metadata=ruled(text))
    ws: WS = field(default=WS.AUTO, metadata=ruled(text))
    affine: Affine = field(default=Affine.MATCH, metadata=ruled(text))
    shrink: float | None = field(default=None, metadata=ruled(optional(number)))
    equalize: bool = field(default=True, metadata=ruled(flag))
    keep: Keep = field(default=Keep.FROZEN, metadata=ruled(text))
    include: tuple[str, ...] = field(default=(), metadata=ruled(texts))
    exclude: tuple[str, ...] = field(default=(), metadata=ruled(texts))
    overrides: tuple[tuple[str, str, int | str], ...] = field(default=(), metadata=ruled(_overrides))

    @classmethod
    def of(cls, **wishes: Any) -> Self:
        """Return the options that `normswap.convert` was called with.

        >>> Options.of(groups=8, exclude="layer4.*", overrides={"layer1.*": {"ws": "none"}}).exclude
        ('layer4.*',)

        Raises:
            InvalidOption: An option is unknown or has a value no layer could be converted with.
        """
        known = [field.name for field in fields(cls)]
        if strange := [name for name in wishes if name not in known]:
            hint = did_you_mean(strange[0], known, otherwise=f"there are {', '.join(known)}", count=1, cutoff=0.6)
            raise InvalidOption(f"{strange[0]}= is no option; {hint}")
        if "overrides" in wishes:
            wishes["overrides"] = _rows(wishes["overrides"])
        options = cls(**wishes)
        options._must_agree({name for name, value in wishes.items() if value is not None})
        return options

    def __post_init__(self) -> None:
        """Refuse values no layer could be converted with; choices are known in capitals, too."""
        for option in ("groups", *CHOICES):
            if isinstance(value := getattr(self, option), str):
                object.__setattr__(self, option, value.lower())
        counted = 1 if self.groups == "auto" else self.groups
        if isinstance(counted, str):
            raise InvalidOption(f"groups={counted!r} must be a whole number of at least 1, or 'auto'")
        num_groups_for(1, groups=counted, group_size=self.group_size, to=self.to)
        if self.shrink is not None and not (
            isinstance(self.shrink, (int, float)) and 0 <= self.shrink <= sys.float_info.max
        ):
            raise InvalidOption(f"shrink={self.shrink!r} must be a number of at least 0")
        for pattern, option, value in self.overrides:
            if not isinstance(pattern, str):
                raise InvalidOption(f"the pattern {pattern!r} in overrides= must be text that names layers")
            if option not in OVERRIDABLE:
                allowed = ", ".join(map(repr, OVERRIDABLE))
                raise InvalidOption(f"the option in overrides[{pattern!r}]={option!r} is not one of {allowed}")
            replace(self, overrides=(), **{option: value})  # type: ignore[arg-type]
        if not isinstance(self.equalize, bool):
            raise InvalidOption(f"equalize={self.equalize!r} must be True or False")
        for option, choices in CHOICES.items():
            object.__setattr__(self, option, _choice(option, getattr(self, option), choices))
        if self.to is To.FROZEN and self.ws in (WS.ADAPTIVE, WS.STANDARD):
            raise InvalidOption(
                f"ws={self.ws.value!r} goes with norms that are replaced; to='frozen' leaves convolutions as they are: "
                "leave ws= out"
            )
        for option in ("include", "exclude"):
            object.__setattr__(self, option, _patterns(option, getattr(self, option)))

    def wishes(self) -> Wishes:
        """Return the keyword arguments of `normswap.convert` that ask for these options."""
        asked = {field.name: getattr(self, field.name) for field in fields(self)}
        asked = {name: value for name, value in asked.items() if value != getattr(type(self), name)}
        silent = {name for name, _ in self._silenced()}
        asked = {name: value for name, value in asked.items() if name not in silent}
        return {**asked, "overrides": self._by_pattern()}  # type: ignore[typeddict-item]

    def _by_pattern(self) -> dict[str, dict[str, int | str]]:
        overrides: dict[str, dict[str, int | str]] = {}
        for pattern, option, value in self.overrides:
            overrides.setdefault(pattern, {})[option] = value
        return overrides

    def _silenced(self) -> Iterator[tuple[str, str]]:
        """Yield the options that say nothing beside others, with what silences them."""
        if self.to is not To.GROUP:
            yield from ((name, f"with to={self.to.value!r}") for name in ("groups", "group_size"))
        if self.group_size is not None:
            yield "groups", "with group_size="
        if self.affine is Affine.COPY:
            yield "shrink", "with affine='copy'"
        if self.affine is Affine.COPY and self.equalize:
            yield "equalize", "with affine='copy'"
        if self.keep is Keep.LIVE and not self.include and not self.exclude:
            yield "keep", "without include= or exclude="

    def _must_agree(self, given: Collection[str], where: str = "") -> None:
        """Raise where options were given of which one leaves another nothing to say.

        Args:
            given: Their names.
            where: The overrides that they are from.
        """
        for name, beside in self._silenced():
            if name in given:
                raise InvalidOption(f"{where}{name}= says nothing {beside}; leave it out, or change that")
        for pattern, own in self._by_pattern().items():
            replace(Options(), **own)._must_agree(own.keys(), f"in overrides[{pattern!r}] ")  # type: ignore[arg-type]

    def shrink_for(self, groups_asked: int | str | None, *, equalized: bool) -> float:
        """Return the value asked for, else what measured best."""
        if self.shrink is not None:
            return self.shrink
        return (AUTO_SHRINK if groups_asked == "auto" else SHRINK)[equalized]

    def leaves(self, name: str) -> str:
        """Return why the patterns leave a layer alone; empty where they do not."""
        if self.include and not any(matches(name, pattern) for pattern in self.include):
            return "no include pattern matches"
        excluded = next((pattern for pattern in self.exclude if matches(name, pattern)), None)
        return f"excluded by {excluded!r}" if excluded else ""

    def freezes(self, name: str) -> bool:
        """Tell whether a norm is to be frozen where no pattern leaves it alone."""
        return self.for_layer(name).to is To.FROZEN

    def for_layer(self, name: str) -> Self:
        """Return the options of one layer: overrides whose pattern matches its name, later ones last."""
        options = self
        for pattern, option, value in self.overrides:
            if matches(name, pattern):
                options = replace(options, **{option: value})  # type: ignore[arg-type]
                if option in ("groups", "to"):
                    options = replace(options, group_size=None)
        return options

    def patterns(self) -> Iterator[tuple[str, str]]:
        """Yield every pattern, each with the option that it belongs to."""
        yield from (("include", pattern) for pattern in self.include)
        yield from (("exclude", pattern) for pattern in self.exclude)
        yield from (("override", pattern) for pattern in dict.fromkeys(pattern for pattern, *_ in self.overrides))

    def must_match(self, modules: Collection[str], layers: Iterable[str], aliases: Mapping[str, str]) -> None:
        """Raise unless every pattern matches something.

        Args:
            modules: Names of the network's modules.
            layers: Names of its norms and convolutions; those, and what holds them, are the names to offer.
            aliases: First names of the modules that have others, by the others.

        Raises:
            InvalidOption: With the pattern and the nearest names.
        """
        for option, pattern in self.patterns():
            if any(matches(name, pattern) for name in modules):
                continue
            if other := next((name for name in aliases if matches(name, pattern)), ""):
                hint = f"it is another name of {aliases[other]!r}; pass that"
            else:
                hint = _nearest(pattern, layers)
            raise InvalidOption(f"{option} {pattern!r} matches no layer; {hint}")

    def must_apply(self, modules: Iterable[str], norms: Collection[str], convs: Collection[str]) -> None:
        """Raise unless every pattern matches a norm or a convolution, and every override one that its option is for.

        Args:
            modules: Names of the network's modules.
            norms: Names of its norms.
            convs: Names of its convolutions.

        Raises:
            InvalidOption: With the pattern, the option and the first module that it matches.
        """
        found = {pattern: [name for name in modules if matches(name, pattern)] for _, pattern in self.patterns()}
        for option, pattern in self.patterns():
            if option != "override" and not any(name in norms or name in convs for name in found[pattern]):
                first = found[pattern][0] if found[pattern] else ""
                raise InvalidOption(
                    f"{option} {pattern!r} matches no norm and no convolution ({first or 'the network'}, …); "
                    "name those, or what holds them"
                )
        for pattern, option, _ in self.overrides:
            role = OVERRIDABLE[option]
            able = norms if role is Role.NORM else convs
            kind = "norms" if role is Role.NORM else "convolutions"
            meant = [name for name in found[pattern] if name in able]
            if meant and all(map(self.leaves, meant)):
                raise InvalidOption(
                    f"the override {pattern!r} sets {option}= of {kind} that stay as they are "
                    f"({meant[0]}: {self.leaves(meant[0])}); leave one of them out"
                )
            if not meant:
                raise InvalidOption(
                    f"the override {pattern!r} sets {option}=, which is for {kind}, and matches none of them "
                    f"({found[pattern][0] or 'the network'}, …); name the {kind}, or what holds them"
                )


def matches(name: str, pattern: str) -> bool:
    """Tell whether a glob pattern matches a layer's qualified name, or that of a module that holds it.

    >>> matches("layer4.0.bn1", "layer4"), matches("layer4.0.bn1", "*.bn?"), matches("layer41.bn1", "layer4")
    (True, True, False)
    """
    if fnmatchcase(name, pattern):
        return True
    holder, dot, _ = name.rpartition(".")
    return bool(dot) and matches(holder, pattern)


def _nearest(pattern: str, layers: Iterable[str]) -> str:
    """Return which pattern would have matched layers, as advice."""
    holders = {".".join(name.split(".")[:depth]) for name in layers for depth in range(1, name.count(".") + 2)}
    bare = pattern.strip("*.") or pattern
    if any(name.endswith(f".{bare}") for name in holders - {pattern}):
        return f"did you mean '*.{bare}'?"
    named = sorted(filter(None, holders), key=lambda name: (name.count("."), name))
    if inner := [name for name in named if bare.endswith(f".{name}")]:
        return f"did you mean {inner[-1]!r}?"
    some = ", ".join(name for name in named if "." not in name) or "none that has a name"
    return did_you_mean(bare, named, otherwise=f"there are {some}", count=3, cutoff=0.6)


def _choice(option: str, value: Any, choices: type[StrEnum]) -> StrEnum:
    if not chosen(choices)(value):
        raise InvalidOption(f"{option}={value!r} is not one of {', '.join(repr(c.value) for c in choices)}")
    return choices(value)


def _patterns(option: str, value: Any) -> tuple[str, ...]:
    patterns = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else (value,)
    if strange := [pattern for pattern in patterns if not isinstance(pattern, str)]:
        raise InvalidOption(f"{option}={strange[0]!r} must be a pattern of layer names, or several of them")
    return patterns


def _rows(overrides: Any) -> tuple[tuple[str, str, int | str], ...]:
    """Return ``{pattern: {option: value}}`` as (pattern, option, value) rows."""
    try:
        return tuple((p, option, value) for p, chosen in overrides.items() for option, value in chosen.items())
    except AttributeError as error:
        raise InvalidOption(f"overrides={overrides!r} must look like {{'layer4.*': {{'groups': 8}}}}") from error
