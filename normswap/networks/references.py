"""Where a network refers to its layers beside their registration, and which of these places could hold another."""

import inspect
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from types import BuiltinMethodType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from normswap.layers.norms import HOOKS
from normswap.networks.copying import PLAIN

ATOMS = (bool, int, float, complex, str, bytes, type(None), type, Tensor, ModuleType, torch.dtype, torch.device)
"""What refers to no layer; a graph of torch.fx names them."""

ENOUGH = 200_000
"""Objects that are looked at; a trainer or a dataset that a network holds may be endless."""

_SKIPPED = ("_parameters", "_buffers", "_compiled_call_impl")


@dataclass(frozen=True)
class Reference:
    """One place that refers to a layer.

    Attributes:
        to: ``id`` of the layer, or of its parameter.
        where: The place in words.
        slots: The dict or list that holds it, None where nothing can be put in its place.
        key: Its key there.
        holder: ``id`` of what holds it, however it was reached.
    """

    to: int
    where: str
    slots: Any = None
    key: Any = None
    holder: int = 0


def references(model: nn.Module, wanted: Collection[int], replaced: Collection[int] = ()) -> Iterator[Reference]:
    """Yield every place within a network's objects that refers to one of the wanted objects.

    Args:
        model: The network.
        wanted: ``id`` of layers, and of parameters that only functions should not know.
        replaced: ``id`` of layers of which nothing but hooks and children will be left.
    """
    for reference, inner, in_code in _walk(model, replaced):
        if reference.to in wanted and (isinstance(inner, nn.Module) or in_code):
            yield reference


def strays(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Yield the modules, with their place, that a network refers to and that are none of its own."""
    own = {id(module) for module in model.modules()}
    for reference, inner, _ in _walk(model, ()):
        if isinstance(inner, nn.Module) and reference.to not in own:
            yield inner, reference.where


def _walk(model: nn.Module, replaced: Collection[int]) -> Iterator[tuple[Reference, Any, bool]]:
    """Yield every reference, what it refers to, and whether a function or a partial holds it.

    Followed are modules, containers, bound methods, partials, closures, defaults and the attributes of objects; the
    functions of the modules' classes, too.
    """
    seen = {id(model)}
    stack: list[tuple[Any, str, bool]] = [(model, "", True)]
    while stack and len(seen) < ENOUGH:
        holder, where, free = stack.pop()
        for inner, place, slots, key in _held(holder, where):
            if type(inner) in PLAIN or (isinstance(inner, ATOMS) and not isinstance(inner, nn.Parameter)):
                continue
            if id(holder) in replaced and key not in (None, "_modules", *HOOKS) and slots is vars(holder):
                continue
            free_slots = slots if free else None
            in_code = isinstance(holder, (FunctionType, partial)) or (isinstance(holder, nn.Module) and slots is None)
            yield Reference(id(inner), place, free_slots, key, id(holder if slots is None else slots)), inner, in_code
            if id(inner) not in seen and not isinstance(inner, Tensor):
                seen.add(id(inner))
                stack.append((inner, place, free_slots is not None or isinstance(inner, nn.Module)))


def _held(holder: Any, where: str) -> Iterator[tuple[Any, str, Any, Any]]:
    """Yield what an object refers to, where, and the dict or list and the key under which it could be replaced."""
    if isinstance(holder, nn.Module):
        own = vars(holder)
        for key, value in own.items():
            if key == "_modules":
                for name, child in value.items():
                    yield child, f"{where}.{name}".lstrip("."), value, name
            elif type(value) not in PLAIN and key not in _SKIPPED and (not isinstance(value, dict) or value):
                yield value, f"{where}.{key}".lstrip("."), own, key
        for value in _of_class(type(holder)):
            yield value, f"the code of {type(holder).__name__}", None, None
    elif isinstance(holder, Mapping):
        slots = holder if isinstance(holder, dict) else None
        for key, value in holder.items():
            yield key, f"{where} (a key)", None, None
            yield value, f"{where}[{key!r:.40}]", slots, key
    elif isinstance(holder, list):
        for index, value in enumerate(holder):
            yield value, f"{where}[{index}]", holder, index
    elif isinstance(holder, (tuple, set, frozenset)) or type(holder).__name__ == "deque":
        for value in holder:
            yield value, f"{where} (a {type(holder).__name__})", None, None
    elif isinstance(holder, partial):
        for value in (holder.func, *holder.args, *holder.keywords.values()):
            yield value, f"{where} (a partial)", None, None
    elif isinstance(holder, (MethodType, BuiltinMethodType)):
        yield holder.__self__, f"{where} (a bound method)", None, None
        if isinstance(holder, MethodType):
            yield holder.__func__, where, None, None
    elif isinstance(holder, FunctionType):
        for value in _of_function(holder):
            yield value, f"{where} (a function)", None, None
    elif not isinstance(holder, torch.fx.Graph):
        slotted = (getattr(holder, name, None) for name in getattr(type(holder), "__slots__", ()) if type(name) is str)
        attributes = getattr(holder, "__dict__", None)
        for value in (*slotted, *(attributes.values() if isinstance(attributes, dict) else ())):
            yield value, f"{where} (a {type(holder).__name__})", None, None


def closed_over(function: FunctionType) -> Iterator[Any]:
    """Yield what a function closes over."""
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # not assigned yet
            yield cell.cell_contents


def _of_function(function: FunctionType) -> Iterator[Any]:
    yield from closed_over(function)
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    yield from vars(function).values()


@cache
def _plain_class(kind: type) -> bool:
    return kind.__module__.startswith("torch.") or kind is object


def _of_class(kind: type[nn.Module]) -> Iterator[Any]:
    """Yield what the functions of a class, as it is outside torch, close over, and its attributes."""
    for cls in kind.__mro__:
        if _plain_class(cls):
            continue
        for name, value in list(vars(cls).items()):
            if inspect.isfunction(value):
                yield from _of_function(value)
            elif not name.startswith("__"):
                yield value
