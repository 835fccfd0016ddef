"""State dicts of converted networks: what they cannot hold is noted beside them, and compared where one is loaded."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from normswap.errors import PlanMismatch
from normswap.layers.norms import ChannelScale, FrozenBatchNorm, PositionNorm

NOTE = "normswap"
"""Key of what a network notes, in the metadata that torch keeps beside the tensors of every module."""

NEARLY = 1e-3
"""Difference, relative, between numbers of norms that another machine may come to."""


def describe_state(model: nn.Module) -> None:
    """Have a network note the numbers of its norms beside its state dict, and refuse one whose norms compute otherwise.

    Args:
        model: A converted network.
    """
    if _note not in model._state_dict_hooks.values():
        model.register_state_dict_post_hook(_note)
    if _must_fit not in [getattr(hook, "hook", hook) for hook in model._load_state_dict_pre_hooks.values()]:
        model.register_load_state_dict_pre_hook(_must_fit)


def _note(model: nn.Module, _state: Any, _prefix: str, about: dict[str, Any]) -> None:
    about[NOTE] = _numbers(model)


def _must_fit(model: nn.Module, state: Mapping[str, Tensor], prefix: str, about: Mapping[str, Any], *_: Any) -> None:
    """Raise unless a state dict means here what it meant where it was made; nothing has been loaded then.

    Raises:
        PlanMismatch: It is of the network before its conversion, or of one with other norms.
    """
    _must_be_converted(model, state, prefix)
    _must_agree(_numbers(model), about.get(NOTE, {}), state, prefix)


def _numbers(model: nn.Module) -> dict[str, dict[str, float]]:
    """Return of every norm, by name, what it computes with that no tensor holds."""
    kinds = nn.GroupNorm, FrozenBatchNorm
    return {name: _numbers_of(module) for name, module in model.named_modules() if isinstance(module, kinds)}


def _numbers_of(norm: Any) -> dict[str, float]:
    frozen = isinstance(norm, FrozenBatchNorm)
    groups = {} if frozen else {"num_groups": norm.num_groups, "over_channels": int(isinstance(norm, PositionNorm))}
    return {**groups, "eps": norm.eps}


def _must_be_converted(model: nn.Module, state: Mapping[str, Tensor], prefix: str) -> None:
    """Raise where a norm that has no running statistics is given some."""
    for name, module in model.named_modules():
        statistics = state.get(f"{prefix}{name}.running_mean")
        if isinstance(module, (nn.GroupNorm, ChannelScale)) and statistics is not None and statistics.numel():
            raise PlanMismatch(
                f"{prefix}{name}: the state dict holds running statistics for it: it is of the network before its "
                "conversion, whose weights mean something else here; load it first and convert afterwards"
            )


def _must_agree(own: Mapping[str, Any], noted: Mapping[str, Any], state: Mapping[str, Tensor], prefix: str) -> None:
    """Raise where a norm that the state dict has weights for computes with other numbers than the one they are of."""
    for name, numbers in own.items():
        others = noted.get(name, numbers) if f"{prefix}{name}.weight" in state else numbers
        same = numbers.keys() == others.keys()
        if not same or not all(math.isclose(value, others[key], rel_tol=NEARLY) for key, value in numbers.items()):
            raise PlanMismatch(
                f"{prefix}{name}: the state dict is of a norm with {_listed(others)}, this one has {_listed(numbers)}, "
                "which no tensor holds; convert as that network was, with its plan: "
                "normswap.apply(network, normswap.plan_of(model))"
            )


def _listed(numbers: Mapping[str, float]) -> str:
    return ", ".join(f"{key} {value:.4g}" for key, value in numbers.items())
