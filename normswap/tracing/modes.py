"""Whether a network's code decides by its mode, by whether gradients are wanted, or by the classes of its layers."""

import dis
import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain, pairwise
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, TypeGuard

from torch import Tensor, nn

from normswap.layers.norms import HOOKS
from normswap.networks.copying import PLAIN
from normswap.networks.overrides import codes
from normswap.networks.recognition import has_kernel, is_batch_norm
from normswap.networks.references import closed_over

FLAG = "training"
"""What torch calls the mode of a module."""

GRADIENTS = "requires_grad", "grad_fn", "is_leaf"
"""What tells code whether gradients are wanted of a tensor."""

BACKWARD = "_backward_hooks", "_backward_pre_hooks"
"""Where modules keep hooks that get gradients."""

WITH_GRADIENTS = frozenset(("is_grad_enabled", "register_hook", "retain_grad"))
"""Functions of torch that tell whether any are, and methods of tensors of which they are."""

CLASS = "__class__"
"""What holds the class of anything; Python's function ``type`` tells it, too."""

ADDING = frozenset(("alpha_dropout", "feature_alpha_dropout"))
"""Functions of torch that add to values where they are told of train mode; what others add grows with these."""

STARTS = "forward", "__call__", "__getattr__", "__getattribute__", "__setattr__", *HOOKS
"""What a pass may run of a module though no code of the network names it."""

OF_DATA = frozenset(
    """__init__ __new__ __post_init__ __init_subclass__ __class_getitem__ __repr__ __str__ __format__ __hash__ __eq__
    __dir__ __del__ __delattr__ __delitem__ __instancecheck__ __subclasscheck__ __copy__ __deepcopy__
    __reduce__ __reduce_ex__ __getstate__ __setstate__""".split()
)
"""Methods of Python's own by which an object is made, shown, compared, emptied or copied."""

STORES = frozenset(("setattr", "bool", "int", "float"))
"""Functions of Python's own that hand a flag back, or keep it."""

TORCHS = frozenset(vars(nn.Module()))
"""Attributes of a module that torch keeps."""

DEPTH = 3
"""Containers and partials, one in another, that functions are looked for in."""

_HANDS_ON = ("LOAD", "KW_NAMES", "PRECALL", "CALL", "PUSH_NULL", "CACHE")
"""Instructions before which a flag is an argument of a call, as of dropout; before others it decides something."""


@dataclass(frozen=True)
class Running:
    """What a forward pass may run outside torch.

    Attributes:
        methods: The modules' own methods, and functions that were put on them, by name.
        codes: Code that runs modules, and that of what it names; each with whether it names any of the program's own.
    """

    methods: Mapping[str, Collection[FunctionType]]
    codes: Sequence[tuple[CodeType, bool]]


def branches_on_mode(found: Running) -> bool:
    """Tell whether what runs decides anything by the mode: by ``training``, or as it is set.

    Handing the mode on to one of torch's functions decides nothing, but for those that add.
    """
    return "train" in found.methods or any(
        _decides(FLAG, code, calls) or not ADDING.isdisjoint(code.co_names) for code, calls in found.codes
    )


def branches_on_gradients(found: Running) -> bool:
    """Tell whether what runs decides by whether gradients are wanted, as by the mode, or reads them in a hook."""
    return not found.methods.keys().isdisjoint(BACKWARD) or any(
        not WITH_GRADIENTS.isdisjoint(code.co_names) or any(_decides(flag, code, calls) for flag in GRADIENTS)
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
    """Return the functions of a class, and of its bases', by name; torch's apart, but for a forward that adds."""
    own = (cls for cls in kind.__mro__ if not _is_torchs(cls))
    methods = [(name, f) for cls in own for name, value in vars(cls).items() for f in _functions_of(value)]
    forward = getattr(kind, "forward", None)
    if isinstance(forward, FunctionType) and not ADDING.isdisjoint(forward.__code__.co_names):
        methods.append(("forward", forward))
    return tuple(methods)


def _reached(value: Any, names: Collection[str], depth: int = DEPTH) -> Iterator[FunctionType]:
    """Yield the functions outside torch that a value is, wraps or holds; of an object or a class, those that are named.

    Its type tells what it is: an object may answer anything for its class, and a dict for its values.
    """
    kind = type(value)
    if kind in PLAIN or issubclass(kind, (Tensor, ModuleType)) or kind.__module__ == "typing" or depth < 0:
        return
    if container := next((base for base in (dict, list, tuple) if issubclass(kind, base)), None):
        for item in dict.values(value) if container is dict else container.__iter__(value):
            yield from _reached(item, names, depth - 1)
    elif issubclass(kind, partial):
        for item in (value.func, *value.args, *value.keywords.values()):
            yield from _reached(item, names, depth - 1)
    elif issubclass(kind, (FunctionType, MethodType)):
        yield from _functions_of(value)
    else:
        own: Any = value if issubclass(kind, type) else kind
        yield from (function for name, function in _own_methods(own) if name in names or _is_unnamed(name))


def _is_unnamed(method: str) -> bool:
    """Tell whether a method may run though no code names it: in an operator, a loop, a ``with``, as an attribute."""
    return method == "forward" or (method.startswith("__") and method not in OF_DATA)


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
    held = _held(modules)
    ahead = [function for name in STARTS for function in methods.get(name, ())]
    seen = set[FunctionType]()
    while ahead:
        function = ahead.pop()
        if function in seen:
            continue
        seen.add(function)
        for code in codes(function.__code__):
            named = {*code.co_names, *(text for text in code.co_consts if isinstance(text, str))}
            values = [*_named(code, function), *(value for name in named & held.keys() for value in held[name])]
            called = [reached for value in values for reached in _reached(value, named)]
            called += [value for name in named & methods.keys() for value in methods[name]]
            found.append((code, bool(called)))
            ahead += called
    return Running(methods, found)


def _held(modules: Iterable[nn.Module]) -> dict[str, list[Any]]:
    """Return what modules and their classes hold beside tensors, modules and hooks, by name: objects, containers."""
    found: dict[str, dict[int, Any]] = {}
    modules = list(modules)
    own = (cls for kind in set(map(type, modules)) for cls in kind.__mro__ if not _is_torchs(cls))
    for attributes in map(vars, chain(modules, own)):
        for name, value in attributes.items():
            if type(value) not in PLAIN and name not in TORCHS and not name.startswith("__"):
                found.setdefault(name, {})[id(value)] = value
    return {name: list(values.values()) for name, values in found.items()}


def _named(code: CodeType, function: FunctionType) -> Iterator[Any]:
    """Yield what code may mean by its names: what its file, its closure and its defaults hold, and modules for it."""
    yield from closed_over(function)
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    for value in [function.__globals__[name] for name in code.co_names if name in function.__globals__]:
        if issubclass(type(value), ModuleType):
            yield from (vars(value)[name] for name in code.co_names if name in vars(value))
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
    """Tell whether code does more with a flag than to hand it on to a function that neither keeps nor returns it."""
    called = ""
    for one, then in pairwise(dis.get_instructions(code)):
        if one.opname == "LOAD_GLOBAL":
            called = one.argval
        elif not one.opname.startswith("LOAD"):
            called = ""
        elif one.argval == flag and one.opname == "LOAD_ATTR" and not _is_handed_on(called, then.opname):
            return True
    return False


def _is_handed_on(called: str, then: str) -> bool:
    """Tell whether a flag is no more than an argument, by the function it is loaded for and the next instruction."""
    return called not in STORES and then.startswith(_HANDS_ON)
