"""What a network's code keeps outside of the network: caches, counters and logs that a pass on a copy would change."""

import functools
import itertools
import random
import sys
import warnings
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import BuiltinMethodType, CellType, CodeType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from normswap.networks.copying import CONTAINERS, PLAIN
from normswap.networks.overrides import codes
from normswap.networks.randomness import same_randomness
from normswap.networks.unfoldable import OnModule

MOST_OBJECTS = 20_000
"""Objects that are looked at, so that a large cache does not take long."""

MOST_BYTES = 2**22
"""Size of a tensor of which a copy is kept."""

COPIED = frozenset(("_parameters", "_buffers", "_modules"))
"""Attributes of a module that every copy has for itself."""

CODE = (FunctionType, property, staticmethod, classmethod, type)
"""Attributes of a class that are followed only where its forward names them, and those of Python's modules never."""

GLOBAL_HOOKS = tuple(
    hooks
    for name, hooks in vars(nn.modules.module).items()
    if name.startswith("_global_forward") and isinstance(hooks, dict)
)
"""Hooks that torch calls for every module of the program."""

MISSING = object()


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Leave as it was, after passes of copies of a model, what its code reaches outside of them."""
    with Surroundings(model).undisturbed():
        yield


class Surroundings:
    """What a model's code reaches outside of copies of the model, as it is now, and how to change that back.

    A copy shares with the model what deepcopy takes for constant: classes, functions with the variables they close
    over, hooks, and what its forward names of globals and of other modules of Python. Lists, dicts, sets, deques,
    attributes, variables and small tensors among them get their contents back, function caches that grew are emptied,
    and random generators go on where they were. What was imported stays so: many modules cannot be imported twice.
    """

    def __init__(self, model: nn.Module) -> None:
        self._restores: list[Callable[[], None]] = []
        self._losses: list[Callable[[], str]] = []
        self._seen: dict[int, Any] = {id(sys.modules): sys.modules}  # held, so that an id stays a name
        for module in model.modules():
            self._walk_module(module)
        for hooks in GLOBAL_HOOKS:
            self._walk(hooks)
        self._device = next((p.device for p in model.parameters()), None)

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Have all of it afterwards as it was when this was made; random generators as they are now.

        What has changed and cannot be put back is warned of.
        """
        try:
            with same_randomness(self._device):
                yield
        finally:
            for restore in reversed(self._restores):
                restore()
            for lost in filter(None, [loss() for loss in self._losses]):
                warnings.warn(f"a forward pass of a copy changed {lost}, which cannot be put back", stacklevel=4)

    def _walk_module(self, module: nn.Module) -> None:
        """Note what a module of the network shares with its copies."""
        self._walk(type(module))
        for name, value in vars(module).items():
            own = name in COPIED or issubclass(type(value), OnModule)  # copies refer to themselves
            if not own and value is not None and (type(value) not in CONTAINERS or value):
                self._walk(value)

    def _walk_all(self, values: Iterable[Any]) -> None:
        for value in values:
            if type(value) not in PLAIN:
                self._walk(value)

    def _walk(self, value: Any) -> None:
        """Note a value, and what it leads to; its type tells what it is, as objects may lie or load when asked."""
        kind = type(value)
        if kind in PLAIN or id(value) in self._seen or len(self._seen) >= MOST_OBJECTS:
            return
        self._seen[id(value)] = value
        if issubclass(kind, Tensor):
            self._note_tensor(value)
        elif hasattr(kind, "__array_interface__") and value.nbytes <= MOST_BYTES:
            self._later(_restore_array, value, value.copy())
        elif issubclass(kind, dict):
            own: Any = OrderedDict if issubclass(kind, OrderedDict) else dict  # subclasses have others
            self._later(_restore_dict, value, dict(own.items(value)))
            self._walk_all(list(dict.values(value)))
        elif issubclass(kind, (list, deque)):
            self._later(_restore_items, value, list(value))
            self._walk_all(list(value))
        elif issubclass(kind, set):
            self._later(_restore_set, value, set(value))
        elif issubclass(kind, itertools.count):
            self._losses.append(functools.partial(_advanced, value, repr(value)))
        elif issubclass(kind, (bytearray, array)):
            self._later(_restore_values, value, value[:])
        elif issubclass(kind, ContextVar):
            self._later(_restore_variable, value, _current(value))
        elif issubclass(kind, random.Random) and not issubclass(kind, random.SystemRandom):  # which has no state
            self._later(value.setstate, value.getstate())
        elif hasattr(kind, "bit_generator"):  # numpy's, without its import
            self._later(setattr, value.bit_generator, "state", value.bit_generator.state)
        elif issubclass(kind, torch.Generator):
            self._later(value.set_state, value.get_state())
        elif issubclass(kind, tuple):
            self._walk_all(value)
        elif issubclass(kind, type):
            self._walk_class(value)
        elif issubclass(kind, FunctionType):
            self._walk_function(value)
        elif issubclass(kind, (MethodType, BuiltinMethodType)):
            self._walk_all((value.__self__, getattr(value, "__func__", None)))
        elif issubclass(kind, functools.partial):
            self._walk_all((value.func, value.args, value.keywords))
        elif hasattr(kind, "cache_clear") and hasattr(kind, "cache_info"):
            self._later(_restore_cache, value, value.cache_info())
            self._walk(getattr(value, "__wrapped__", None))
        elif not issubclass(kind, ModuleType) and (issubclass(kind, nn.Module) or not _is_of_torch(kind)):
            self._walk_all((kind, _attributes(value)))
            slots = [slot for cls in kind.__mro__ for slot in _slots(cls)]
            if slots:
                held = {slot: slot.__get__(value) if _has(slot, value) else MISSING for slot in slots}
                self._later(_restore_slots, value, held)

    def _later(self, restore: Callable[..., None], *values: Any) -> None:
        self._restores.append(functools.partial(restore, *values))

    def _walk_class(self, kind: type) -> None:
        """Note the attributes of a class and its bases, and what its forward leads to."""
        own = [cls for cls in kind.__mro__ if cls is not object and not _is_of_torch(cls)]
        for cls in own:
            attributes = dict(vars(cls))
            self._later(_restore_class, cls, attributes)
            self._walk_all(value for value in attributes.values() if not issubclass(type(value), CODE))
        called = ["forward", "__call__"] if own else []
        for name in called:
            for code in (vars(cls)[name] for cls in own if name in vars(cls)):
                function = getattr(code, "fget", None) or getattr(code, "__func__", code)
                self._walk(function)
                if isinstance(function, FunctionType):
                    called += [key for key in _names(function.__code__) if key not in called and hasattr(kind, key)]

    def _walk_function(self, function: FunctionType) -> None:
        """Note the variables that a function closes over or names, its defaults, and what these lead to."""
        if _is_of_torch(function):
            return
        self._walk_all((function.__defaults__, function.__kwdefaults__, vars(function)))
        for cell in function.__closure__ or ():
            content = _content(cell)
            self._later(_restore_cell, cell, content)
            self._walk(content)
        space, names = function.__globals__, _names(function.__code__)
        bound = {name: space.get(name, MISSING) for name in names}
        self._later(_restore_names, space, bound)
        self._walk_all(bound.values())
        for module in bound.values():
            if issubclass(type(module), ModuleType) and not _is_of_torch(module):
                own = {name: vars(module)[name] for name in names if name in vars(module)}
                self._later(_restore_names, vars(module), own)
                self._walk_all(item for item in own.values() if not issubclass(type(item), CODE))

    def _note_tensor(self, tensor: Tensor) -> None:
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
        if not plain or tensor.is_meta or tensor.is_inference():
            return
        if tensor.nbytes > MOST_BYTES:
            self._losses.append(functools.partial(_written_to, tensor, tensor._version))
        else:
            self._later(_restore_tensor, tensor, tensor.detach().clone(), tensor._version)


def _is_of_torch(code: Any) -> bool:
    where = code.__name__ if isinstance(code, ModuleType) else getattr(code, "__module__", None)
    return str(where).partition(".")[0] in ("torch", "builtins")


def _names(code: CodeType) -> set[str]:
    """Return the globals and attributes that code names, with what is defined inside it."""
    return set[str]().union(*(inner.co_names for inner in codes(code)))


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not set yet
        return MISSING


def _current(variable: ContextVar[Any]) -> Any:
    try:
        return variable.get()
    except LookupError:  # not set, and no default
        return MISSING


def _attributes(value: Any) -> Any:
    try:
        return vars(value)
    except Exception:  # no attributes, or a lazy object of its own kind
        return None


def _slots(cls: type) -> list[Any]:
    """Return the descriptors of attributes that a class keeps outside of a dict."""
    return (
        [value for value in vars(cls).values() if isinstance(value, MemberDescriptorType)]
        if "__slots__" in vars(cls)
        else []
    )


def _has(slot: Any, value: Any) -> bool:
    try:
        slot.__get__(value)
    except AttributeError:
        return False
    return True


def _restore_slots(value: Any, saved: dict[Any, Any]) -> None:
    for slot, content in saved.items():
        now = slot.__get__(value) if _has(slot, value) else MISSING
        if content is MISSING and now is not MISSING:
            slot.__delete__(value)
        elif now is not content:
            slot.__set__(value, content)


def _restore_array(value: Any, saved: Any) -> None:
    if value.tobytes() != saved.tobytes():
        value[...] = saved


def _restore_cell(cell: CellType, content: Any) -> None:
    if content is not MISSING and _content(cell) is not content:
        cell.cell_contents = content


def _restore_names(space: dict[str, Any], bound: dict[str, Any]) -> None:
    for name, value in bound.items():
        if value is MISSING:
            space.pop(name, None)
        elif space.get(name, MISSING) is not value:
            space[name] = value


def _restore_dict(value: dict[Any, Any], saved: dict[Any, Any]) -> None:
    plain: Any = OrderedDict if isinstance(value, OrderedDict) else dict  # update() of a Counter adds up
    same = list(plain.keys(value)) == list(saved)
    if same and all(dict.get(value, key, MISSING) is item for key, item in saved.items()):
        return
    plain.clear(value)
    for key, item in saved.items():
        plain.__setitem__(value, key, item)


def _restore_items(value: list[Any] | deque[Any], saved: list[Any]) -> None:
    if len(value) != len(saved) or any(now is not before for now, before in zip(value, saved, strict=True)):
        value.clear()
        value.extend(saved)


def _restore_values(value: Any, saved: Any) -> None:
    if value != saved:
        value[:] = saved


def _restore_variable(variable: ContextVar[Any], saved: Any) -> None:
    if saved is not MISSING and variable.get() is not saved:
        variable.set(saved)


def _restore_set(value: set[Any], saved: set[Any]) -> None:
    if {id(item) for item in value} != {id(item) for item in saved}:
        value.clear()
        value.update(saved)


def _restore_class(cls: type, saved: dict[str, Any]) -> None:
    now = dict(vars(cls))
    for name in now.keys() | saved.keys():
        if name.startswith("__") or now.get(name, MISSING) is saved.get(name, MISSING):
            continue
        if name in saved:
            setattr(cls, name, saved[name])
        else:
            delattr(cls, name)


def _restore_cache(function: Any, saved: Any) -> None:
    if function.cache_info().misses != saved.misses:
        function.cache_clear()


def _restore_tensor(tensor: Tensor, saved: Tensor, version: int) -> None:
    if tensor._version != version:
        tensor.data.copy_(saved)


def _advanced(counter: Any, before: str) -> str:
    return "" if repr(counter) == before else f"an itertools.{before}"


def _written_to(tensor: Tensor, version: int) -> str:
    return "" if tensor._version == version else f"a tensor {tuple(tensor.shape)} outside of the network"
