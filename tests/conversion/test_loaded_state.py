"""State dicts that mean something else in a converted network than where they were made."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import conv, warm
from torch import nn

import normswap

X = torch.randn(2, 3, 16, 16)


def original() -> nn.Sequential:
    layers = (
        conv(3, 16),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        conv(16, 16),
        nn.BatchNorm2d(16),
        nn.Flatten(),
        nn.Linear(16, 4),
    )
    layers[-1].in_features = 16
    pooled = nn.Sequential(*layers[:-2], nn.AdaptiveAvgPool2d(1), *layers[-2:])
    return warm(pooled)  # type: ignore[return-value]


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "itself": lambda model: model,
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "folded": normswap.fold,
    "converted again": lambda model: normswap.convert(nn.Sequential(model, nn.BatchNorm2d(4)), example_input=X)[0],
}


@pytest.mark.parametrize("ws", ["adaptive", "standard", "none"])
@pytest.mark.parametrize("strict", [True, False])
def test_the_original_s_state_is_refused_and_nothing_is_loaded(strict: bool, ws: str) -> None:
    model = original()
    converted = normswap.convert(model, example_input=X, ws=ws)
    before = copy.deepcopy(converted.state_dict())
    nn.init.zeros_(model[0].weight)
    with pytest.raises(
        normswap.PlanMismatch, match="^1: the state dict holds running statistics .* convert afterwards"
    ):
        converted.load_state_dict(model.state_dict(), strict=strict)
    assert all(torch.equal(value, before[key]) for key, value in converted.state_dict().items())


@pytest.mark.parametrize("made", COPIES.values(), ids=COPIES)
def test_wherever_the_network_is(made: Callable[[nn.Module], nn.Module]) -> None:
    model = original()
    holder = nn.ModuleDict({"net": made(normswap.convert(model, example_input=X))})
    holder.load_state_dict(through_a_file(holder.state_dict()))
    with pytest.raises(normswap.PlanMismatch, match=r"^net\.1: the state dict holds running statistics"):
        holder.load_state_dict({f"net.{key}": value for key, value in model.state_dict().items()}, strict=False)


@pytest.mark.parametrize(
    "options", [{"batches": [X]}, {"groups": 2}, {"over": "channels", "groups": 1}, {"shrink": 1.0}]
)
def test_a_state_of_other_norms_is_refused(options: dict[str, Any]) -> None:
    model = original()
    other = normswap.convert(model, example_input=X, **options)
    again = normswap.convert(model, example_input=X)
    with pytest.raises(
        normswap.PlanMismatch, match=r"^1: the state dict is of a norm with num_groups .*plan_of\(model\)"
    ):
        again.load_state_dict(through_a_file(other.state_dict()), strict=True)
    rebuilt = normswap.apply(original(), normswap.plan_of(other))
    rebuilt.load_state_dict(through_a_file(other.state_dict()), strict=True)
    assert torch.equal(rebuilt(X), other(X))


def test_a_frozen_norm_has_an_epsilon_too() -> None:
    model = original()
    frozen = normswap.convert(model, example_input=X, to="frozen")
    other = copy.deepcopy(frozen)
    next(module for module in other.modules() if hasattr(module, "running_mean")).eps = 0.5  # type: ignore[assignment]
    with pytest.raises(
        normswap.PlanMismatch, match=r"^1: the state dict is of a norm with eps 0\.5, this one has eps 1e-05"
    ):
        frozen.load_state_dict(other.state_dict())
    frozen.load_state_dict(model.state_dict(), strict=False)


def test_what_means_the_same_is_loaded() -> None:
    model = original()
    converted, other = (normswap.convert(model, example_input=X, groups=groups) for groups in (8, 4))
    head = {key: value for key, value in model.state_dict().items() if key.startswith("7.")}
    assert len(head) == 2
    converted.load_state_dict(head, strict=False)
    converted.load_state_dict(dict(converted.named_parameters()), strict=False)
    parts = other.state_dict()
    for key in [key for key in parts if not key.startswith("7.")]:
        del parts[key]  # what torch notes of the layers stays
    converted.load_state_dict(parts, strict=False)
    torch.nn.Sequential(*original()).load_state_dict(model.state_dict(), strict=True)
