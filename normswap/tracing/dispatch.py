"""Run every operator of a forward pass, on meta tensors where any operand is one, and have it noted."""

import dis
import sys
from functools import lru_cache
from types import CodeType, FrameType
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

HANDS_ON = frozenset((Tensor.tolist, Tensor.__dlpack__))
"""What gives a tensor's values to code outside of torch, and runs no operator; where they are does the same."""

PLACES = {getattr(Tensor, f"is_{kind}").__get__: kind for kind in ("meta", "cpu", "cuda", "mps", "xpu")}
"""What tells code whether a tensor is on a kind of device."""

DEVICE = Tensor.device.__get__
"""What tells code the device of a tensor, which it may hand on or compare."""


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
    """See what passes between torch and Python without an operator: numbers, and on a device that has none.

    Args:
        recorder: What is told of them.
        home: Kind of the device that the network is on; None where it runs there.

    Attributes:
        asked_where: Whether code outside torch asked for the kind of a tensor's device, and heard another one than at
            home.
    """

    def __init__(self, recorder: Recorder, home: str | None) -> None:
        super().__init__()
        self._recorder, self._home, self.asked_where = recorder, home, False

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Call one function of torch."""
        asking = sys._getframe(1)
        if self._home is not None and (
            func == DEVICE or func is Tensor.data_ptr or PLACES.get(func) in ("meta", self._home)
        ):
            self.asked_where |= _decides_where(asking, whole=func != DEVICE)
        if func in HANDS_ON or (func is Tensor.data_ptr and not _is_known(asking)):
            self._recorder.note_handed_on(args[0])
        result = func(*args, **(kwargs or {}))
        if func in FROM_NUMBERS and not any(tensors_in((args[func is Tensor.new_tensor :], kwargs))):
            self._recorder.note_number(result)
        return result


def _is_known(asking: FrameType) -> bool:
    """Tell whether code is torch's, or our own."""
    return str(asking.f_globals.get("__name__")).partition(".")[0] in ("torch", "normswap")


def _decides_where(asking: FrameType, *, whole: bool) -> bool:
    """Tell whether code outside torch asks where a tensor is; of its device, whether it asks for the kind."""
    return not _is_known(asking) and (whole or _asks_for_the_kind(asking.f_code, asking.f_lasti))


@lru_cache(maxsize=4096)
def _asks_for_the_kind(code: CodeType, place: int) -> bool:
    """Tell whether code takes the type of the device it gets, or compares it with what a text names."""
    later = [step for step in dis.get_instructions(code) if step.offset > place]
    if later and later[0].argval == "type":
        return True
    compared = next((at for at, step in enumerate(later[:10]) if step.opname == "COMPARE_OP"), 0)
    between = later[:compared]
    return any(isinstance(step.argval, str) and step.opname == "LOAD_CONST" for step in between) and not any(
        step.opname.startswith(("STORE", "POP")) for step in between
    )


def _size(tensor: Tensor) -> int:
    """Return a tensor's bytes; a sparse one's are few."""
    return tensor.nbytes if tensor.layout is torch.strided else 0


def _on_meta(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], operands: list[Tensor]) -> Any:
    result = shape_alone(func, name, args, operands)
    return answer(func, name, args, kwargs) if result is NotImplemented else result
