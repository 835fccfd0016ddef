"""Copies of a model: one with its data, one on the meta device that costs nothing."""

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from normswap.errors import UnsupportedModel


def copy_model(model: nn.Module) -> nn.Module:
    """Return a deep copy; tensors that a hook computed from parameters (pruning, weight_norm) are detached copies."""
    return _copied(model, {id(t): t.detach().clone() for t in _computed_tensors(model)})


def meta_copy(model: nn.Module) -> nn.Module:
    """Return a copy whose parameters and buffers are on the meta device; no data is copied."""
    memo: dict[int, Any] = {id(t): torch.empty_like(t.detach(), device="meta") for t in _computed_tensors(model)}
    for parameter in model.parameters():
        twin = torch.empty_like(parameter.detach(), device="meta")
        memo[id(parameter)] = nn.Parameter(twin, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer.detach(), device="meta")
    return _copied(model, memo)


def _copied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    for module in model.modules():  # a module holds some ten empty containers, most of what deepcopy takes time for
        memo |= {id(v): type(v)() for v in vars(module).values() if type(v) in (dict, OrderedDict, set) and not v}
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise UnsupportedModel(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}); "
            "take what is neither module nor tensor (locks, files, generators) off it first"
        ) from error


def module_names(model: nn.Module) -> dict[int, list[str]]:
    """Return every qualified name of every module, by ``id(module)``, in registration order."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    return names


def _computed_tensors(model: nn.Module) -> list[Tensor]:
    """Tensors kept as plain attributes that are not leaves of autograd, which deepcopy refuses."""
    return [
        value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    ]
