"""What a user can ask of a conversion, checked before anything is looked at."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from normswap.errors import InvalidOption
from normswap.planning.groups import num_groups_for


def _chosen(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InvalidOption(f"{option}={value!r} is not one of {', '.join(map(repr, allowed))}")


@dataclass(frozen=True)
class Options:
    """What the user asked for; see `normswap.convert` for each."""

    groups: int | str = 32
    group_size: int | None = None
    to: str = "group"
    ws: str = "auto"
    affine: str = "match"
    shrink: float | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    overrides: tuple[tuple[str, str, int | str], ...] = ()

    def __post_init__(self) -> None:
        """Refuse values no layer could be converted with."""
        counted = 1 if self.groups == "auto" else self.groups
        num_groups_for(1, groups=counted, group_size=self.group_size, to=self.to)  # type: ignore[arg-type]
        if self.shrink is not None and not (isinstance(self.shrink, (int, float)) and 0 <= self.shrink < math.inf):
            raise InvalidOption(f"shrink={self.shrink!r} must be a number of at least 0")
        for pattern, option, value in self.overrides:
            _chosen(f"the option in overrides[{pattern!r}]", option, ("groups", "group_size", "to", "ws"))
            replace(self, overrides=(), **{option: value})  # type: ignore[arg-type]
        _chosen("ws", self.ws, ("auto", "adaptive", "standard", "none"))
        _chosen("affine", self.affine, ("match", "copy"))
        for option in ("include", "exclude"):
            value = getattr(self, option)
            patterns = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else (value,)
            if strange := [pattern for pattern in patterns if not isinstance(pattern, str)]:
                raise InvalidOption(f"{option}={strange[0]!r} must be a pattern of layer names, or several of them")
            object.__setattr__(self, option, patterns)

    def shrink_for(self, groups_asked: int | str | None) -> float:
        """Return the value asked for, else what measured best: 0.5, and 1.5 where the group count is chosen too."""
        if self.shrink is not None:
            return self.shrink
        return 1.5 if groups_asked == "auto" else 0.5

    def for_layer(self, name: str) -> "Options":
        """Return the options of one layer: later overrides win, and a count and a size of groups exclude each other."""
        options = self
        for pattern, option, value in self.overrides:
            if fnmatchcase(name, pattern):
                options = replace(options, **{option: value})  # type: ignore[arg-type]
                if option in ("groups", "to"):
                    options = replace(options, group_size=None)
        return options


def flat_overrides(overrides: Mapping[str, Mapping[str, int | str]]) -> tuple[tuple[str, str, int | str], ...]:
    """Return ``{pattern: {option: value}}`` as (pattern, option, value) rows.

    Raises:
        InvalidOption: It is not such a mapping.
    """
    try:
        return tuple((p, option, value) for p, chosen in overrides.items() for option, value in chosen.items())
    except AttributeError as error:
        raise InvalidOption(f"overrides={overrides!r} must look like {{'layer4.*': {{'groups': 8}}}}") from error
