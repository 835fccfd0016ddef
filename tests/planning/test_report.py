"""A plan as people read it."""

from normswap.planning.choices import WS, Action, Affine
from normswap.planning.entry import ConvEntry, NormEntry
from normswap.planning.report import plan_table, summary

MATCHED = NormEntry("bn1", "BatchNorm2d", Action.GROUP_NORM, "trained", groups=4, drift=0.25, affine=Affine.MATCH)
CARRYING = NormEntry("bn2", "BatchNormAct2d", Action.GROUP_NORM, "fresh", groups=1, then=("drop", "act"))
SCALED = NormEntry("bn3", "BatchNorm2d", Action.SCALE, "one value per sample")
LEFT = NormEntry("", "BatchNorm1d", Action.KEEP, "reached by no forward pass")
STANDARDIZED = ConvEntry("conv1", "Conv2d", Action.STANDARDIZE, "feeds bn1", feeds=("bn1",), ws=WS.ADAPTIVE)
PLAIN = [
    ConvEntry(name, "Conv2d", Action.KEEP, f"feeds {reader}", feeds=(reader,))
    for name, reader in (("a", "fc"), ("b", "head"))
]


def test_a_row_per_layer_then_the_totals_then_the_warnings() -> None:
    assert plan_table([STANDARDIZED, MATCHED, CARRYING, SCALED, LEFT], ["mind the head"]).splitlines() == [
        "layer   is              becomes                   drift  why",
        "-----------------------------------------------------------------------------------",
        "conv1   Conv2d          WS adaptive                      feeds bn1",
        "bn1     BatchNorm2d     GroupNorm(4)              0.25   trained",
        "bn2     BatchNormAct2d  GroupNorm(1) + drop, act         fresh",
        "bn3     BatchNorm2d     ChannelScale                     one value per sample",
        "(root)  BatchNorm1d     -                                reached by no forward pass",
        "",
        "2 of 4 norms become GroupNorm: 1 of 4 groups, 1 of 1 group",
        "1 norms that see one value per sample become ChannelScale",
        "1 of 1 convolutions are weight-standardized: 1 adaptive",
        "left: 1 x norm: reached by no forward pass",
        "warning: mind the head",
    ]


def test_layers_left_for_one_reason_add_up_whatever_they_feed() -> None:
    assert summary(PLAIN, []) == [
        "0 of 0 norms become GroupNorm",
        "0 of 2 convolutions are weight-standardized",
        "left: 2 x conv: feeds another layer",
    ]
