"""Which tensors are parameters, and what reads them."""

import torch
from torch import nn

from normswap.networks.network import Network
from normswap.tracing.parameters import Parameters


def test_a_copy_of_a_parameter_counts_as_it_and_arithmetic_does_not() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    parameters, weight = Parameters(Network(model)), model[0].weight
    half, scaled = weight.half(), weight * 2
    parameters.note_constant("to_copy", [weight], [half], frozenset({"0.weight"}))
    parameters.note_constant("mul", [weight], [scaled], frozenset({"0.weight"}))
    assert parameters.leaf(half) == parameters.leaf(weight) == "0.weight"
    assert parameters.leaf(scaled) is None
    assert parameters.holds(scaled)
    assert parameters.sources([scaled, model[0].bias]) == {"0.weight", "0.bias"}
    assert parameters.reads == {}  # as an average is made; who reads that is known by what it was made from
    parameters.note_constant("abs", [scaled], [scaled.abs()], frozenset({"0.weight"}))
    assert parameters.reads == {"0.weight": {"abs"}}


def test_data_is_no_parameter() -> None:
    model, x = nn.Linear(2, 2), torch.zeros(2)
    parameters = Parameters(Network(model))
    assert (parameters.leaf(x), parameters.holds(x), parameters.sources([x])) == (None, False, frozenset())


def test_a_shared_parameter_has_one_name_and_every_owner() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    parameters = Parameters(Network(model))
    assert parameters.leaf(model[1].weight) == "0.weight"
    assert parameters.owners("0.weight") == ["0", "1"]


def test_a_norm_is_told_by_its_running_statistics() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Linear(2, 2))
    parameters = Parameters(Network(model))
    assert parameters.norm_of([model[0].weight, model[0].running_var]) == "0"  # type: ignore[list-item]
    assert parameters.norm_of([model[0].weight, model[1].weight]) is None
