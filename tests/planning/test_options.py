"""Options by layer."""

import pytest
import timm
from nets import CASES

import normswap


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
