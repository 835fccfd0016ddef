"""Run every operator of a forward pass, on meta tensors where any operand is one, and have it noted."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from normswap.networks.inputs import tensors_in
from normswap.tracing.meta_results import DECISIONS, all_meta, answer, decision, shape_alone
from normswap.tracing.operators import VIEWS, base_name, spelled
from normswap.tracing.recorder import Recorder

MOST_CALLS = 200_000
"""Operators of one pass; recurrent networks over thousands of steps stay below."""

MOST_ANSWERS = 300
"""Values that are made up in a pass without data: a loop that waits for another one never ends."""

MOST_DECISIONS = 64
"""Values of data that a pass reads before it may count as a loop that waits for one."""

MOST_BYTES = 2**29
"""Size of all results, which are kept until its end, of a pass with data that may be such a loop."""

FROM_NUMBERS = frozenset((torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor))
"""Functions that make a tensor of what Python holds."""


class Endless(BaseException):
    """A forward pass goes on and on; no network's own ``except Exception`` is to keep it going."""


class Dispatch(TorchDispatchMode):
    """See every operator that runs under it.

    Args:
        recorder: What notes each operator, once it has run.
        yes: What Python is told where it decides by a value that there is none of.

    Attributes:
        decided: Whether it was told so.

    Raises:
        Endless: The pass does not end: it loops until data says otherwise.
    """

    def __init__(self, recorder: Recorder, *, yes: bool = True) -> None:
        super().__init__()
        self._recorder, self._yes = recorder, yes
        self._calls = self._answers = self._decisions = self._bytes = 0

    @property
    def decided(self) -> bool:
        return self._answers > 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run one operator and have it noted."""
        kwargs = kwargs or {}
        name = base_name(func)
        operands = list(tensors_in((args, kwargs)))
        on_meta = any(tensor.is_meta for tensor in operands)
        if on_meta:
            args, kwargs = all_meta(args, operands), all_meta(kwargs, operands)
            if kwargs.get("device") is not None:
                kwargs = {**kwargs, "device": torch.device("meta")}
        name = "batch_norm" if "batch_norm" in name else name
        self._calls += 1
        if name in DECISIONS:
            self._answers += on_meta
            self._decisions += not on_meta
        waits = self._decisions > MOST_DECISIONS and self._bytes > MOST_BYTES
        if waits or self._calls > MOST_CALLS or self._answers > MOST_ANSWERS:
            raise Endless
        if on_meta and name in DECISIONS:
            result = decision(name, operands[0], yes=self._yes)
        else:
            result = _on_meta(func, name, args, kwargs, operands) if on_meta else NotImplemented
        if result is NotImplemented:
            result = func(*args, **kwargs)
            self._bytes += 0 if on_meta or name in VIEWS else sum(map(_size, tensors_in(result)))
        self._recorder.note(func, spelled(name, func, args), operands, result)
        return result


class Numbers(TorchFunctionMode):
    """See the tensors that torch makes of Python's numbers: on the meta device it runs no operator for them.

    Args:
        recorder: What is told of them.
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Call one function of torch."""
        result = func(*args, **(kwargs or {}))
        if func in FROM_NUMBERS and not any(tensors_in((args[func is Tensor.new_tensor :], kwargs))):
            self._recorder.note_number(result)
        return result


def _size(tensor: Tensor) -> int:
    """Return a tensor's bytes; a sparse one's are few."""
    return tensor.nbytes if tensor.layout is torch.strided else 0


def _on_meta(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], operands: list[Tensor]) -> Any:
    result = shape_alone(func, name, args, operands)
    return answer(func, name, args, kwargs) if result is NotImplemented else result
