"""Whether a network's code decides by its mode, by whether gradients are wanted, or by the classes of its layers."""

import dis
import inspect
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, pairwise
from types import CodeType, FunctionType, ModuleType
from typing import Any, TypeGuard

from torch import nn

from normswap.layers.norms import HOOKS
from normswap.networks.overrides import codes
from normswap.networks.recognition import has_kernel, is_batch_norm
from normswap.networks.references import closed_over

FLAG = "training"
"""What torch calls the mode of a module."""

GRADIENTS = "requires_grad", "grad_fn"
"""What tells code whether gradients are wanted of a tensor."""

ENABLED = "is_grad_enabled"
"""Function of torch that tells whether any are."""

CLASS = "__class__"
"""What holds the class of anything; Python's function ``type`` tells it, too."""

_HANDS_ON = ("LOAD", "KW_NAMES", "PRECALL", "CALL", "PUSH_NULL", "CACHE")
"""Instructions before which a flag is an argument of a call, as of dropout; before others it decides something."""


@dataclass(frozen=True)
class Running:
    """What a forward pass may run outside torch.

    Attributes:
        methods: Names of the modules' own methods, and of functions that were put on them.
        codes: Code that runs modules, and that of what it names; each with whether it names any of the program's own.
    """

    methods: Collection[str]
    codes: Sequence[tuple[CodeType, bool]]


def branches_on_mode(found: Running) -> bool:
    """Tell whether what runs decides anything by the mode: by ``training``, or as it is set.

    Handing the mode on to one of torch's functions decides nothing.
    """
    return "train" in found.methods or any(_decides(FLAG, code, calls) for code, calls in found.codes)


def branches_on_gradients(found: Running) -> bool:
    """Tell whether what runs decides by whether gradients are wanted, as by the mode."""
    return any(
        ENABLED in code.co_names or any(_decides(flag, code, calls) for flag in GRADIENTS)
        for code, calls in found.codes
    )


def branches_on_classes(found: Running) -> bool:
    """Tell whether what runs asks for the very class of anything."""
    return any(CLASS in code.co_names or _uses_type(code) for code, _ in found.codes)


def blocks_branch_on_mode(model: nn.Module) -> bool:
    """Tell whether modules with children or a kernel decide anything by ``training``, as `branches_on_mode` has it.

    They choose what runs; others compute, and what they compute should not depend on the mode.
    """
    found = running(module for module in model.modules() if module._modules or has_kernel(module))
    return any(_decides(FLAG, code, calls) for code, calls in found.codes)


def _put_on(module: nn.Module) -> Iterator[tuple[str, FunctionType]]:
    """Yield the functions that were put on one module, by name: hooks, a forward of its own, others that it calls."""
    for name, value in vars(module).items():
        found = value.values() if name in HOOKS and isinstance(value, dict) else (value,) if callable(value) else ()
        for one in found:
            yield from ((name, function) for function in _functions_of(one))


@lru_cache(maxsize=1024)
def _own_methods(kind: Any) -> tuple[tuple[str, FunctionType], ...]:
    """Return the functions of a class of modules, and of its bases', by name; torch's apart."""
    own = (cls for cls in kind.__mro__ if issubclass(cls, nn.Module) and not _is_torchs(cls))
    return tuple((name, f) for cls in own for name, value in vars(cls).items() for f in _functions_of(value))


def _functions_of(member: Any) -> Iterator[FunctionType]:
    """Yield the functions outside torch that a member of a class is, or wraps: a method, a property, a partial."""
    for value in (member, *(getattr(member, key, None) for key in ("fget", "__func__", "func"))):
        if callable(value) and _is_own(function := inspect.unwrap(value)):
            yield function


def running(modules: Iterable[nn.Module]) -> Running:
    """Return what a forward pass through modules may run; norms count as what they are shown to compute."""
    modules = [module for module in modules if not is_batch_norm(module)]
    methods, found = dict[str, set[FunctionType]](), list[tuple[CodeType, bool]]()
    for name, function in chain(*map(_own_methods, set(map(type, modules))), *map(_put_on, modules)):
        methods.setdefault(name, set()).add(function)
    ahead = [function for name in ("forward", "__call__", *HOOKS) for function in methods.get(name, ())]
    seen = set[FunctionType]()
    while ahead:
        function = ahead.pop()
        if function in seen:
            continue
        seen.add(function)
        for code in codes(function.__code__):
            named = {*code.co_names, *(text for text in code.co_consts if isinstance(text, str))}
            called = [value for value in _named(code, function) if _is_own(value)]
            called += [value for name in named & methods.keys() for value in methods[name]]
            found.append((code, bool(called)))
            ahead += called
    return Running(methods, found)


def _named(code: CodeType, function: FunctionType) -> Iterator[Any]:
    """Yield what code may mean by its names: what its file and its closure hold, and what modules hold for it."""
    held = [function.__globals__[name] for name in code.co_names if name in function.__globals__]
    held += closed_over(function)
    for value in held:
        kind = type(value)  # an object may answer anything for its class, and a dict for its values
        if issubclass(kind, ModuleType):
            yield from (vars(value)[name] for name in code.co_names if name in vars(value))
        elif base := next((base for base in (dict, list, tuple) if issubclass(kind, base)), None):
            yield from dict.values(value) if base is dict else base.__iter__(value)
        else:
            yield value


def _is_own(value: Any) -> TypeGuard[FunctionType]:
    return issubclass(type(value), FunctionType) and not _is_torchs(value)


def _is_torchs(value: Any) -> bool:
    return str(getattr(value, "__module__", "")).partition(".")[0] == "torch"


@lru_cache(maxsize=1024)
def words(kind: Any, method: str = "forward") -> frozenset[str]:
    """Return the names and strings in a method of a class, and in those methods of it that these name."""
    found, ahead = set[str](), [method]
    own = [cls for cls in kind.__mro__ if cls is not nn.Module and issubclass(cls, nn.Module)]
    methods: dict[str, Any] = {name: value for cls in reversed(own) for name, value in vars(cls).items()}
    while ahead:
        own_method = methods.pop(ahead.pop(), None)
        function = inspect.unwrap(own_method) if callable(own_method) else None
        for code in codes(function.__code__) if inspect.isfunction(function) else ():
            found.update(code.co_names, (text for text in code.co_consts if isinstance(text, str)))
        ahead = [name for name in found if name in methods]
    return frozenset(found)


def _decides(flag: str, code: CodeType, calls: bool) -> bool:
    """Tell whether code asks for an attribute, and does more with it than to hand it on to torch."""
    return flag in code.co_consts or (flag in code.co_names and (calls or _decides_itself(flag, code)))


@lru_cache(maxsize=4096)
def _uses_type(code: CodeType) -> bool:
    """Tell whether code names Python's own ``type``, and not an attribute or a method that is called so."""
    return "type" in code.co_names and any(
        step.argval == "type" and step.opname in ("LOAD_GLOBAL", "LOAD_NAME") for step in dis.get_instructions(code)
    )


def _decides_itself(flag: str, code: CodeType) -> bool:
    """Tell whether code does more with a flag than to hand it on."""
    loads = pairwise(dis.get_instructions(code))
    return any(
        one.argval == flag and one.opname == "LOAD_ATTR" and not then.opname.startswith(_HANDS_ON)
        for one, then in loads
    )
