"""Plans as JSON data, and what a file may put into them."""

import json
from dataclasses import replace
from typing import Any

import broken
import pytest

import normswap
from normswap.planning.choices import WS, Action, Affine, Role, To
from normswap.planning.entry import entry_from
from normswap.planning.schema import must_be_inputs


@pytest.fixture
def plan() -> normswap.Plan:
    return normswap.inspect(broken.Net(), example_input=broken.X)


def again(plan: normswap.Plan) -> normswap.Plan:
    return normswap.Plan.from_dict(json.loads(json.dumps(plan.to_dict())))


def test_entries_know_their_role(plan: normswap.Plan) -> None:
    assert [type(entry) for entry in again(plan).entries] == [type(entry) for entry in plan.entries]
    assert {entry.role for entry in plan.norms} == {Role.NORM}
    assert {entry.role for entry in plan.convs} == {Role.CONV}
    assert {row["role"] for row in plan.to_dict()["entries"]} == {"norm", "conv"}


@pytest.mark.parametrize("field", ["eps", "drift"])
def test_zero_is_a_value(plan: normswap.Plan, field: str) -> None:
    (first, *_) = plan.norms
    changed = plan.with_entries({first.name: replace(first, **{field: 0.0})})
    assert again(changed) == changed
    assert getattr(again(changed).norms[0], field) == 0.0


def test_choices_come_back_as_choices(plan: normswap.Plan) -> None:
    entries = again(plan).entries
    assert all(isinstance(entry.action, Action) for entry in entries)
    assert {type(entry.ws) for entry in again(plan).convs} == {WS}
    assert {type(entry.affine) for entry in again(plan).norms} == {Affine}
    assert (type(again(plan).options.to), type(again(plan).options.ws)) == (To, WS)


NORM = {"name": "bn", "kind": "BatchNorm2d", "role": "norm", "action": "keep", "reason": ""}
CONV = {"name": "conv", "kind": "Conv2d", "role": "conv", "action": "keep", "reason": ""}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "role": ({**NORM, "role": "bias"}, "the layer 'bn': role cannot be 'bias'"),
    "unknown field": ({**NORM, "rank": 3}, "the layer 'bn': unknown field 'rank'"),
    "field of the other role": ({**CONV, "groups": 4}, "the layer 'conv': a conv has no groups"),
    "value of the other role": ({**CONV, "groups": -4}, "the layer 'conv': groups cannot be -4"),
    "shape": ({**NORM, "shape": [1, -1]}, "the layer 'bn': shape cannot be"),
    "negative epsilon": ({**NORM, "eps": -1e-5}, "the layer 'bn': eps cannot be -1e-05"),
    "epsilon beyond floats": ({**NORM, "eps": 10**400}, "the layer 'bn': eps cannot be 1000"),
    "text that is not printable": ({**NORM, "reason": "\x1b[2J"}, "the layer 'bn': reason cannot be"),
    "name that is no text": ({**NORM, "name": 3}, "a layer: name cannot be 3"),
    "flaw": ({**NORM, "action": "group_norm", "channels": 8, "groups": 3, "eps": 1}, "3 groups do not divide 8"),
}


@pytest.mark.parametrize(("data", "message"), WRONG.values(), ids=WRONG)
def test_what_an_entry_may_not_hold(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        entry_from(data)


TENSOR = {"tensor": [2, 3, 8, 8], "dtype": "float32"}
INPUTS: dict[str, tuple[Any, bool]] = {
    "none": (None, True),
    "tensor": (TENSOR, True),
    "containers": ({"tuple": [TENSOR, {"dict": {"x": TENSOR}}, {"list": [TENSOR]}]}, True),
    "too many elements": ({"list": [{"tensor": [2**14, 2**14], "dtype": "float32"}, TENSOR]}, False),
    "unknown type": ({"tensor": [2], "dtype": "object"}, False),
    "more than a tensor": ({**TENSOR, "file": "x"}, False),
    "dict of a list": ({"dict": [TENSOR]}, False),
    "unknown container": ({"set": [TENSOR]}, False),
    "empty": ({}, False),
    "no container": ([TENSOR], False),
}


@pytest.mark.parametrize(("spec", "fits"), INPUTS.values(), ids=INPUTS)
def test_example_inputs_of_a_file(spec: Any, fits: bool) -> None:
    if fits:
        must_be_inputs(spec)
    else:
        with pytest.raises(ValueError, match="an example input cannot be|have more than"):
            must_be_inputs(spec)


def test_containers_of_example_inputs_are_not_nested_for_ever() -> None:
    spec: Any = TENSOR
    for _ in range(40):
        spec = {"list": [spec]}
    with pytest.raises(ValueError, match="an example input cannot be"):
        must_be_inputs(spec)
