"""Whether a class sets its mode in a way of its own, and whether that is shown to set modes and nothing else."""

import builtins
import dis
from collections.abc import Iterator
from functools import lru_cache
from inspect import signature, unwrap
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torch import nn

MODES = ("train", "eval")
"""Methods by which torch sets the mode."""

ASKS = frozenset(
    "super isinstance issubclass hasattr getattr setattr len range zip enumerate list tuple dict set any all bool int "
    "str type reversed sorted min max id".split()
)
"""Functions of Python's own that look at something, or set an attribute."""

WALKS = frozenset(
    "train eval modules children named_modules named_children parameters named_parameters buffers named_buffers "
    "get_submodule requires_grad_ zero_grad items keys values get pop append extend clear update copy startswith "
    "endswith detach clone fill_ zero_ copy_ data".split()
)
"""Methods of modules, tensors, containers and text that do no more."""

DEPTH = 4
"""Functions called by functions that are followed."""


def sets_modes_alone(module: nn.Module) -> bool:
    """Tell whether ``train`` and ``eval`` of a module, its children's apart, are shown to do nothing but set modes.

    Shown are torch's own, and those that take what torch's take and call nothing but what is known: torch's by way of
    ``super``, methods that walk through modules, and functions of the class and its file of which the same holds. Some
    packages call a training run ``train``.
    """
    return not any(name in vars(module) for name in MODES) and _class_sets_modes_alone(type(module))  # type: ignore[arg-type]


@lru_cache(maxsize=4096)
def _class_sets_modes_alone(kind: Any) -> bool:
    own = {name: getattr(kind, name) for name in MODES}
    changed = {name: value for name, value in own.items() if value is not getattr(nn.Module, name)}
    return all(_takes_a_mode(name, value) and _is_known(value, kind, DEPTH) for name, value in changed.items())


def _takes_a_mode(name: str, function: Any) -> bool:
    """Tell whether a method takes what torch's takes, and nothing else."""
    if not isinstance(function, FunctionType):
        return False
    parameters = list(signature(function).parameters.values())
    ordinary = all(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)
    return ordinary and len(parameters) == (2 if name == "train" else 1)


def _is_known(function: Any, kind: type[nn.Module], depth: int) -> bool:
    """Tell whether a function calls nothing but what is known to look or to set."""
    function = unwrap(function)
    return isinstance(function, FunctionType) and all(
        _calls_what_is_known(code, function, kind, depth) for code in codes(function.__code__)
    )


def codes(code: CodeType) -> Iterator[CodeType]:
    """Yield a function's code, and that of the functions within it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes(constant)


def _calls_what_is_known(code: CodeType, function: FunctionType, kind: type[nn.Module], depth: int) -> bool:
    """Tell whether code loads nothing that could do more, and calls no more often than it loads what may be called."""
    callable_loads = calls = 0
    for step in dis.get_instructions(code):
        name = step.argval
        if step.opname.startswith("IMPORT"):
            return False
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            value = function.__globals__.get(name, vars(builtins).get(name))
            if not _is_known_global(name, value, kind, depth):
                return False
            callable_loads += callable(value)
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
            value = getattr(kind, name, None)
            if name not in WALKS and not _is_known_attribute(name, value, kind, depth):
                return False
            callable_loads += name in WALKS or isinstance(value, FunctionType)
        callable_loads += step.opname == "MAKE_FUNCTION"
        calls += step.opname in ("CALL", "CALL_KW", "CALL_FUNCTION_EX")
    return calls <= callable_loads


def _is_known_global(name: str, value: Any, kind: type[nn.Module], depth: int) -> bool:
    if isinstance(value, FunctionType):
        return depth > 0 and _is_known(value, kind, depth - 1)
    if isinstance(value, ModuleType):
        return value.__name__.partition(".")[0] == "torch"
    if name in ASKS:
        return value is vars(builtins)[name]
    return not callable(value) or (isinstance(value, type) and issubclass(value, (nn.Module, BaseException)))


def _is_known_attribute(name: str, value: Any, kind: type[nn.Module], depth: int) -> bool:
    """Tell whether an attribute is data, a module, or a method that is known."""
    followed = value.fget if isinstance(value, property) else value
    if not isinstance(followed, FunctionType):
        return True
    return not hasattr(nn.Module, name) and depth > 0 and _is_known(followed, kind, depth - 1)
