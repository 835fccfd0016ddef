"""Copies of a model: one with its data, one on the meta device that costs nothing."""

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from normswap.errors import UnsupportedModel

PLAIN = frozenset((bool, int, float, complex, str, bytes, type(None)))
DICTS = frozenset((dict, OrderedDict))
CONTAINERS = DICTS | {list, set}


def copy_model(model: nn.Module) -> nn.Module:
    """Return a deep copy; tensors that a hook computed from parameters (pruning, weight_norm) are detached copies."""
    modules = list(model.modules())
    return _copied(model, modules, {id(t): t.detach().clone() for t in _computed_tensors(modules)})


def meta_copy(model: nn.Module) -> nn.Module:
    """Return a copy whose parameters and buffers are on the meta device; no data is copied."""
    modules = list(model.modules())
    memo: dict[int, Any] = {id(t): _twin(t) for t in _computed_tensors(modules)}
    for module in modules:
        memo |= {id(p): nn.Parameter(_twin(p), p.requires_grad) for p in module._parameters.values() if p is not None}
        memo |= {id(b): _twin(b) for b in module._buffers.values() if b is not None}
    return _copied(model, modules, memo)


def _twin(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor.detach(), device="meta")


def _copied(model: nn.Module, modules: list[nn.Module], memo: dict[int, Any]) -> nn.Module:
    """Do what deepcopy does, without a call for each attribute of each module: most are plain values, or empty."""
    usual = [module for module in modules if _is_copied_by_attributes(type(module))]
    memo |= {id(module): module.__new__(type(module)) for module in usual}
    try:
        for module in reversed(usual):  # children before those that hold them
            memo[id(module)].__setstate__(_copied_state(module.__getstate__(), memo))
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise UnsupportedModel(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}); "
            "take what is neither module nor tensor (locks, files, generators) off it first"
        ) from error


def _is_copied_by_attributes(kind: type[nn.Module]) -> bool:
    own = any(hasattr(kind, name) for name in ("__deepcopy__", "__getnewargs_ex__", "__getnewargs__"))
    return not own and kind.__reduce_ex__ is object.__reduce_ex__ and kind.__reduce__ is object.__reduce__


def _copied_state(state: Any, memo: dict[int, Any]) -> Any:
    if type(state) is not dict:
        return copy.deepcopy(state, memo)
    return {key: value if type(value) in PLAIN else _copied_value(value, memo) for key, value in state.items()}


def _copied_value(value: Any, memo: dict[int, Any]) -> Any:
    kind = type(value)
    if kind in PLAIN or (kind is tuple and all(type(item) in PLAIN for item in value)):
        return value
    if id(value) in memo:
        return memo[id(value)]
    if kind in CONTAINERS and not value:
        return memo.setdefault(id(value), kind())
    if kind is list:
        items: list[Any] = memo.setdefault(id(value), [])
        items.extend([_copied_value(item, memo) for item in value])
        return items
    if kind in DICTS and all(type(key) is str for key in value):
        fields: dict[str, Any] = memo.setdefault(id(value), kind())
        for key, item in value.items():
            fields[key] = _copied_value(item, memo)
        return fields
    return copy.deepcopy(value, memo)


def _computed_tensors(modules: list[nn.Module]) -> list[Tensor]:
    """Tensors kept as plain attributes that are not leaves of autograd, which deepcopy refuses."""
    return [
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    ]
