"""Whether the code of a network does something else in train mode than in eval mode."""

import dis
import inspect
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from types import CodeType
from typing import Any

from torch import nn

from normswap.networks.recognition import has_kernel, is_batch_norm

_DECIDES = ("POP_JUMP", "JUMP_IF", "TO_BOOL", "UNARY_NOT", "COPY", "STORE", "COMPARE", "IS_OP", "RETURN")
"""Instructions after which a flag has been more than handed on to a function such as dropout."""


def branches_on_mode(model: nn.Module) -> bool:
    """Tell whether a module with children or a kernel, of a class outside torch, decides anything by ``training``.

    Another one sees the outputs of no layer but what it is given, and returns.
    """
    own = (
        module for module in model.modules() if (module._modules or has_kernel(module)) and not is_batch_norm(module)
    )
    return any(_decides(type(module)) for module in own)  # type: ignore[arg-type]


@lru_cache(maxsize=1024)
def _decides(kind: Any) -> bool:
    own = (cls for cls in kind.__mro__ if issubclass(cls, nn.Module) and not cls.__module__.startswith("torch."))
    functions = (value for cls in own for value in vars(cls).values() if inspect.isfunction(value))
    return any(_reads_to_decide(code) for f in functions for code in codes(f.__code__))


def codes(code: CodeType) -> Iterator[CodeType]:
    """Yield a function's code, and that of the functions within it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes(constant)


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


def _reads_to_decide(code: CodeType) -> bool:
    if "training" not in code.co_names:
        return False
    steps = list(dis.get_instructions(code))
    return any(
        one.argval == "training" and one.opname == "LOAD_ATTR" and then.opname.startswith(_DECIDES)
        for one, then in pairwise(steps)
    )
