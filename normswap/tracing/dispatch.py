"""Run every operator of a forward pass, on meta tensors where any operand is one, and have it noted."""

import sys
from types import FrameType
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

PLACES = {getattr(Tensor, f"is_{kind}").__get__: kind for kind in ("meta", "cpu", "cuda", "mps", "xpu")}
"""What tells code whether a tensor is on a kind of device."""

DEVICE = Tensor.device.__get__
"""What tells code the device of a tensor, which it may hand on or compare."""

MEMORY = frozenset((Tensor.data_ptr, Tensor.get_device, Tensor.storage, Tensor.type, Tensor.untyped_storage))
"""What tells more of where a tensor is than another device's can answer."""

META = torch.device("meta")


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


class Home(TorchFunctionMode):
    """Let code outside torch find tensors of the meta device where the network is, and see those made of numbers.

    The device that it is told is this object's own: whatever is to be made on it is made on the meta device. For a
    tensor of Python's numbers torch runs no operator there.

    Args:
        recorder: What is told of such tensors.
        device: Where the network is.

    Attributes:
        asked_where: Whether code outside torch asked for what only a tensor there can tell.
    """

    def __init__(self, recorder: Recorder, device: torch.device) -> None:
        super().__init__()
        self._recorder, self._device, self.asked_where = recorder, device, False

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Call one function of torch."""
        kwargs = kwargs or {}
        if (func == DEVICE or func in PLACES or func in MEMORY) and args[0].is_meta and _is_own(sys._getframe(1)):
            if func not in MEMORY:
                return self._device if func == DEVICE else PLACES[func] == self._device.type
            self.asked_where = True
        args = tuple(META if value is self._device else value for value in args)
        if kwargs.get("device") is self._device:
            kwargs = {**kwargs, "device": META}
        result = func(*args, **kwargs)
        if func in FROM_NUMBERS and not any(tensors_in((args[func is Tensor.new_tensor :], kwargs))):
            self._recorder.note_number(result)
        return result


def _is_own(asking: FrameType) -> bool:
    """Tell whether code is outside torch, and none of this package."""
    return str(asking.f_globals.get("__name__")).partition(".")[0] not in ("torch", "normswap")


def _size(tensor: Tensor) -> int:
    """Return a tensor's bytes; a sparse one's are few."""
    return tensor.nbytes if tensor.layout is torch.strided else 0


def _on_meta(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], operands: list[Tensor]) -> Any:
    result = shape_alone(func, name, args, operands)
    return answer(func, name, args, kwargs) if result is NotImplemented else result
