"""Copies that have memory in common with their originals, for passes that are shown not to write to it."""

from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import cache
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

T = TypeVar("T")


class _Written(BaseException):
    """A pass is about to write to memory that its network shares; network code that catches errors lets it through."""


class _Watch(TorchDispatchMode):
    """Stop an operator that would write to shared memory, before it does."""

    def __init__(self) -> None:
        super().__init__()
        self.shared: dict[int, Any] = {}  # held, so that an address stays a name
        self.written = False

    def share(self, parameter: nn.Parameter) -> nn.Parameter:
        """Return a parameter in the same memory, which is watched from now on."""
        storage = parameter.untyped_storage()
        self.shared[storage._cdata] = storage
        return nn.Parameter(parameter.detach(), parameter.requires_grad)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run one operator."""
        kwargs = kwargs or {}
        if places := _written_by(func):
            for name, number in places:
                value = kwargs.get(name) if number is None or number >= len(args) else args[number]
                for one in value if isinstance(value, (list, tuple)) else (value,):
                    if isinstance(one, Tensor) and self._is_shared(one):
                        self.written = True
                        raise _Written
        return func(*args, **kwargs)

    def _is_shared(self, tensor: Tensor) -> bool:
        return tensor.layout is torch.strided and tensor.untyped_storage()._cdata in self.shared


@cache
def _written_by(func: Any) -> tuple[tuple[str, int | None], ...]:
    """Return which arguments of an operator it writes to, by name and place."""
    arguments = enumerate(func._schema.arguments)
    written = ((a.name, None if a.kwarg_only else n) for n, a in arguments if a.alias_info and a.alias_info.is_write)
    return tuple(written)


_SPARING: ContextVar[_Watch | None] = ContextVar("who watches shared memory", default=None)


def sparing(run: Callable[[], T]) -> T:
    """Return what passes on copies of networks show, without memory for the large parameters of every copy.

    Copies that `normswap.networks.copying.copy_model` makes meanwhile have them in common with their originals. Where
    a pass turns out to write to one it is stopped, and `run` starts again with copies that share nothing.

    Args:
        run: Makes copies, runs them, and gives parameters of theirs new values by ``parameter.data = …`` alone.
    """
    watch = _Watch()
    token = _SPARING.set(watch)
    try:
        with watch:
            result = run()
        if not watch.written:
            return result
    except _Written:
        pass
    finally:
        _SPARING.reset(token)
    return run()


def shared_parameters(model: nn.Module) -> Iterator[tuple[int, nn.Parameter]]:
    """Yield what copies get for a network's large parameters at present, by ``id`` of these; nothing by default."""
    watch = _SPARING.get()
    if watch is not None:
        yield from ((id(parameter), watch.share(parameter)) for parameter in large_parameters(model))


def large_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters that make up a network's size: filters and matrices.

    Vectors may be running statistics, which operators of torch write to without saying so.
    """
    return (parameter for parameter in model.parameters() if parameter.ndim > 1 and can_be_shared(parameter))


def can_be_shared(parameter: Tensor | None) -> TypeGuard[nn.Parameter]:
    """Tell whether a parameter of a copy may begin in the memory of its original: a plain one that holds data."""
    if parameter is None or type(parameter) is not nn.Parameter:
        return False
    plain = parameter.layout is torch.strided and not parameter.is_meta and not parameter.is_inference()
    return parameter.is_leaf and plain
