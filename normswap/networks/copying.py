"""Copies of a model: one with its data, one on the meta device that costs nothing."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from normswap.errors import UnsupportedModel
from normswap.networks.overrides import sets_modes_alone
from normswap.networks.sharing import shared_parameters

PLAIN = frozenset((bool, int, float, complex, str, bytes, type(None)))
DICTS = frozenset((dict, OrderedDict))
CONTAINERS = DICTS | {list, set}


def copy_model(model: nn.Module, lent: Iterable[nn.Parameter] = ()) -> nn.Module:
    """Return a deep copy; tensors that autograd computed (kept activations, pruned weights) are detached copies.

    Args:
        model: The model.
        lent: Parameters of which the copy gets ones with the same memory: their data is to be replaced at once.
    """
    memo: dict[int, Any] = dict(shared_parameters(model))
    memo |= {id(one): nn.Parameter(one.data, one.requires_grad) for one in lent}  # detached, they would count together
    return _copied(model, list(model.modules()), memo, lambda tensor: tensor.detach().clone())


def meta_copy(model: nn.Module) -> nn.Module:
    """Return a copy whose parameters and buffers are on the meta device; no data is copied."""
    return copy_with(model, _twin)


def copy_with(model: nn.Module, twin: Callable[[Tensor], Tensor]) -> nn.Module:
    """Return a copy whose parameters and buffers are what a function makes of the model's."""
    modules = list(model.modules())
    memo: dict[int, Any] = {}
    for module in modules:
        memo |= {id(p): nn.Parameter(twin(p), p.requires_grad) for p in module._parameters.values() if p is not None}
        memo |= {id(b): twin(b) for b in module._buffers.values() if b is not None}
    return _copied(model, modules, memo, twin)


def in_mode(model: nn.Module, training: bool) -> nn.Module:
    """Set the mode of a network and return it.

    Methods of the network's own run only where they are shown to set modes and nothing else: a ``train`` may start a
    training run, or refuse a mode.
    """
    if all(map(sets_modes_alone, model.modules())):
        with suppress(Exception):  # what is made for inference may raise
            model.train(training)
            return model
    model.training = training
    for child in model.children():
        in_mode(child, training)
    return model


def _twin(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor.detach(), device="meta")


class _Detaching(TorchFunctionMode):
    """Copy tensors that are no leaves of autograd, which deepcopy refuses, by a function of one's own."""

    def __init__(self, twin: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._twin = twin

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Copy one tensor, or run anything else as it is."""
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            return memo.setdefault(id(tensor), self._twin(tensor))
        return func(*args, **(kwargs or {}))


def _copied(
    model: nn.Module, modules: list[nn.Module], memo: dict[int, Any], twin: Callable[[Tensor], Tensor]
) -> nn.Module:
    """Do what deepcopy does, without a call for each attribute of each module: most are plain values, or empty."""
    usual = [module for module in modules if _is_copied_by_attributes(type(module))]
    memo |= {id(module): module.__new__(type(module)) for module in usual}
    try:
        with _Detaching(twin):
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
