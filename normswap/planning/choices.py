"""The choices of a conversion, each spelled once."""

from enum import StrEnum


class To(StrEnum):
    """What a norm becomes: groups of channels, one group, one channel per group, or itself with fixed statistics."""

    GROUP = "group"
    LAYER = "layer"
    INSTANCE = "instance"
    FROZEN = "frozen"


class WS(StrEnum):
    """Which weight standardization is asked for."""

    AUTO = "auto"
    ADAPTIVE = "adaptive"
    STANDARD = "standard"
    NONE = "none"


class Affine(StrEnum):
    """Where the affine values of a new norm come from."""

    MATCH = "match"
    COPY = "copy"


class Over(StrEnum):
    """Over what a norm's statistics are taken, beside the channels of a group."""

    SAMPLE = "sample"  # all positions, as GroupNorm does
    CHANNELS = "channels"  # nothing else: each position has its own


class Keep(StrEnum):
    """How a norm that the user keeps goes on: with the statistics it has, or with those of the batch as it trains."""

    FROZEN = "frozen"
    LIVE = "live"


class Role(StrEnum):
    """What a layer is to a plan."""

    NORM = "norm"
    CONV = "conv"


class Action(StrEnum):
    """What happens to a layer."""

    GROUP_NORM = "group_norm"
    SCALE = "scale"  # a norm that sees one value per sample
    STANDARDIZE = "standardize"
    FREEZE = "freeze"  # a norm that stays, with its statistics in train mode, too
    KEEP = "keep"
