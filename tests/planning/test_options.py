"""What can be asked for, and for which layers."""

from collections.abc import Callable

import pytest
import timm
from nets import CASES

import normswap
from normswap.planning.choices import WS
from normswap.planning.options import Options


def test_options_by_layer() -> None:
    overrides = {"layer4.*": {"groups": 8, "ws": "none"}, "layer4.1.bn2": {"group_size": 128}, "bn1": {"to": "layer"}}
    plan = normswap.inspect(timm.create_model("resnet18"), overrides=overrides)
    groups = {entry.name: entry.groups for entry in plan.norms}
    assert (groups["bn1"], groups["layer3.0.bn1"], groups["layer4.0.bn1"], groups["layer4.1.bn2"]) == (1, 32, 8, 4)
    assert {e.name for e in plan.convs if not e.changes} == {e.name for e in plan.convs if e.name.startswith("layer4")}
    assert normswap.Plan.from_dict(plan.to_dict()) == plan


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"bn1": 8}, "must look like"),
        ({"bn1": {"eps": 1}}, "the option in overrides\\['bn1'\\]='eps' is not one of"),
        ({"bn1": {"groups": 0}}, "groups=0 must be a whole number"),
    ],
)
def test_bad_options_by_layer(overrides: dict[str, dict[str, int]], message: str) -> None:
    with pytest.raises(normswap.InvalidOption, match=message):
        normswap.inspect(CASES["direct"].build(), overrides=overrides)


def test_options_of_what_convert_was_called_with() -> None:
    options = Options.of(groups=8, ws="none", include="a.*", exclude=["b", "c"], overrides={"d": {"groups": 4}})
    assert (options.groups, options.ws, options.include, options.exclude) == (8, WS.NONE, ("a.*",), ("b", "c"))
    assert options.overrides == (("d", "groups", 4),)
    assert Options.of() == Options()


UNKNOWN = {
    "near": ({"grops": 3}, "grops= is no option; did you mean groups?"),
    "far": (
        {"zzz": 3},
        "zzz= is no option; there are groups, group_size, to, over, ws, affine, shrink, equalize, keep",
    ),
}


@pytest.mark.parametrize("call", [normswap.convert, normswap.inspect, Options.of], ids=["convert", "inspect", "of"])
@pytest.mark.parametrize(("wishes", "message"), UNKNOWN.values(), ids=UNKNOWN)
def test_an_unknown_option_is_named(call: Callable[..., object], wishes: dict[str, int], message: str) -> None:
    arguments = () if call == Options.of else (CASES["direct"].build(),)
    with pytest.raises(normswap.InvalidOption, match=message.replace("?", r"\?")):
        call(*arguments, **wishes)


def test_a_count_and_a_size_of_groups_exclude_each_other_by_layer() -> None:
    options = Options.of(group_size=16, overrides={"a": {"groups": 4}, "b": {"group_size": 2}})
    assert (options.for_layer("a").groups, options.for_layer("a").group_size) == (4, None)
    assert options.for_layer("b").group_size == 2
    assert options.for_layer("c") == options


@pytest.mark.parametrize(
    ("shrink", "asked", "equalized", "used"),
    [
        (None, 32, True, 4),
        (None, "auto", True, 60),
        (None, 32, False, 0.5),
        (None, "auto", False, 1.5),
        (0, 32, True, 0),
    ],
)
def test_shrink_for(shrink: float | None, asked: int | str, equalized: bool, used: float) -> None:
    assert Options.of(shrink=shrink).shrink_for(asked, equalized=equalized) == used
