"""How many groups a layer gets: integers in, integers out."""

from collections.abc import Mapping

from normswap.errors import InvalidOption
from normswap.planning.choices import To

MIN_CHANNELS = 2
"""Channels a group needs to be more than instance norm (Wu & He 2018: ResNet-50 has 2 at its narrowest)."""

MIN_ELEMENTS = 16
"""Elements (channels × positions) a group needs for its statistics to mean anything."""

AUTO = 32
"""Largest group count that ``groups="auto"`` gives a norm without statistics to choose by (Wu & He 2018)."""


def divisors(number: int) -> list[int]:
    """Return the divisors of `number`, largest first."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)}, reverse=True)


def group_counts(num_channels: int, *, positions: int | None = None) -> list[int]:
    """Return every group count that leaves every group 2 channels and 16 elements, and 1.

    >>> group_counts(48, positions=1)
    [3, 2, 1]
    """
    return sorted({num_groups_for(num_channels, groups=d, positions=positions) for d in divisors(num_channels)})[::-1]


def num_groups_for(
    num_channels: int,
    *,
    groups: int = 32,
    group_size: int | None = None,
    to: str = "group",
    positions: int | None = None,
) -> int:
    """Return the group count for one layer.

    >>> num_groups_for(48)
    24
    >>> num_groups_for(64, group_size=16)
    4
    >>> num_groups_for(64, positions=1)
    4

    Args:
        num_channels: Channels C of the layer.
        groups: Largest count wanted; the largest divisor of C at most this is taken that leaves at least
            2 channels and 16 elements to a group, else 1.
        group_size: Channels per group wanted instead of `groups` (Wu & He 2018, section 4.1, table 3 right); the
            smallest divisor of C at least this that leaves 16 elements to a group.
        to: ``"group"``, ``"layer"`` (one group) or ``"instance"`` (one channel per group, more where that would leave
            a group a single element, whose normalized value is always zero).
        positions: Spatial positions of the layer's input (H·W; 1 for (N, C)); None where unknown.

    Raises:
        InvalidOption: A count below 1, or an unknown `to`.
    """
    if to not in list(To):
        raise InvalidOption(f"to={to!r} is not one of {', '.join(repr(choice.value) for choice in To)}")
    either = group_size is not None
    for option, value, needed in (("groups", groups, not either), ("group_size", group_size, False)):
        if (value is not None or needed) and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise InvalidOption(f"{option}={value!r} must be a whole number of at least 1")
    if to == To.LAYER:
        return 1
    if to == To.INSTANCE:
        wanted, smallest, elements = num_channels, 1, 2
    elif group_size is not None:
        wanted, smallest, elements = num_channels // group_size, group_size, MIN_ELEMENTS
    else:
        wanted, smallest, elements = groups, MIN_CHANNELS, MIN_ELEMENTS
    for count in divisors(num_channels):
        channels = num_channels // count
        if count <= wanted and channels >= smallest and (positions is None or channels * positions >= elements):
            return count
    return 1


def least(drifts: Mapping[int, float]) -> int:
    """Return the group count that drifts least; of those that drift alike, the one nearest to the usual count.

    >>> least({64: 0.0, 32: 0.0, 1: 0.0}), least({64: 0.2, 1: 0.1})
    (32, 1)
    """
    return min(drifts, key=lambda count: (float(f"{drifts[count]:.6g}"), abs(count - AUTO)))
