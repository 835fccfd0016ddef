"""Keep standardized kernels between forward passes that record no gradient, for as long as nothing has changed them."""

import math
from dataclasses import dataclass
from functools import lru_cache
from operator import is_
from typing import TYPE_CHECKING, Any, Self, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

if TYPE_CHECKING:
    from normswap.layers.convs import WeightStandardized

KEPT: "WeakKeyDictionary[nn.Module, Kept]" = WeakKeyDictionary()
"""Kernels beside their layers, so that no copy, no pickle and no state dict holds one."""


@dataclass(frozen=True, eq=False, slots=True)
class Origin:
    """What a kernel was made from.

    Attributes:
        tensors: Filters, gain and offset themselves.
        marks: What torch tells of them: version, place and layout; of filters alone where values are looked at.
        look: Where in the filters, as they lie in memory, and what was there; None where that takes more than a look.
        constants: Gain and offset as they were.
    """

    tensors: tuple[Tensor | None, ...]
    marks: tuple[Any, ...]
    look: "Look | None"
    constants: tuple[Tensor, ...]

    @classmethod
    def of(cls, conv: "WeightStandardized", weight: Tensor) -> Self:
        """Note what a layer with a weight standardizes now."""
        tensors = _tensors(conv, weight)
        if not _can_be_looked_at(tensors):
            return cls(tensors, _marks(conv, tensors), None, ())
        constants = tuple(value.clone() for value in tensors[1:] if value is not None)
        return cls(tensors, _marks(conv, tensors[:1]), Look.at(weight.detach()), constants)

    def holds(self, conv: "WeightStandardized", weight: Tensor) -> bool:
        """Tell whether a layer would make the same kernel again, by all that torch tells and some of the values.

        Of changes in place through ``.data`` or numpy torch tells nothing.
        """
        tensors = _tensors(conv, weight)
        if not all(map(is_, tensors, self.tensors)):
            return False
        if self.look is None:
            return self.marks == _marks(conv, tensors)
        if self.marks != _marks(conv, tensors[:1]) or not self.look.holds():
            return False
        return all(map(torch.equal, self.constants, (value for value in tensors[1:] if value is not None)))


@dataclass(frozen=True, eq=False, slots=True)
class Look:
    """Some values of a weight, of every filter, every input channel and every position one at least.

    Attributes:
        memory: The weight's values in the order of memory, which it keeps from being used for others.
        places: Where.
        values: What was there.
    """

    memory: Tensor
    places: Tensor
    values: Tensor

    @classmethod
    def at(cls, weight: Tensor) -> Self:
        """Look at a weight without gaps in memory."""
        memory, places = weight.as_strided((weight.numel(),), (1,)), _places(weight.shape, weight.stride())
        return cls(memory, places, memory.take(places))

    def holds(self) -> bool:
        """Tell whether the same is there now."""
        return torch.equal(self.memory.take(self.places), self.values)


@dataclass(frozen=True, eq=False, slots=True)
class Kept:
    """A kernel as the convolution uses it, what it was made from, and the precision of autocast in that pass."""

    kernel: Tensor
    origin: Origin
    precision: torch.dtype | None


def kept_kernel(conv: "WeightStandardized") -> Tensor | None:
    """Return the kernel of a layer that is only evaluated; None where it has to be standardized in this pass.

    That is where a gradient is recorded for the filters, in train mode, away from the CPU, where something computes the
    weight, and where the pass is not only run but looked at: by compilers, tracers, modes and function transforms.
    """
    weight = conv._parameters.get("weight")
    if conv.training or weight is None or (torch.is_grad_enabled() and weight.requires_grad):
        return None
    if is_in_torch_dispatch_mode() or torch.jit._trace.is_tracing():
        return None
    if is_transformed():
        return None
    kept = KEPT.get(conv)
    precision = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    if kept is None or kept.precision is not precision or not kept.origin.holds(conv, weight):
        if type(weight) is not nn.Parameter or not _can_be_looked_at(_tensors(conv, weight)):
            return None
        with torch.inference_mode(False), torch.no_grad():
            KEPT[conv] = kept = Kept(conv.fresh_kernel(), Origin.of(conv, weight), precision)
    return kept.kernel


def is_transformed() -> bool:
    """Tell whether a function of ``torch.func`` transforms the pass: vmap, grad, jvp."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def forget(conv: nn.Module) -> None:
    """Give the memory of a layer's kernel back."""
    KEPT.pop(conv, None)


def _tensors(conv: "WeightStandardized", weight: Tensor) -> tuple[Tensor | None, ...]:
    return weight, conv._buffers["ws_gain"], conv._buffers["ws_offset"]


def _can_be_looked_at(tensors: tuple[Tensor | None, ...]) -> bool:
    """Tell whether values of a weight and its constants are at hand, and torch counts their changes."""
    for tensor in tensors:
        if tensor is not None and (not tensor.is_cpu or tensor.layout is not torch.strided or tensor.is_inference()):
            return False
    return _is_dense(cast(Tensor, tensors[0]))


def _is_dense(weight: Tensor) -> bool:
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(weight.ndim)
    return weight.is_contiguous() or (last is not None and weight.is_contiguous(memory_format=last))


def _marks(conv: "WeightStandardized", tensors: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
    weight = cast(Tensor, tensors[0])
    own = [None if t is None or t.is_inference() else (t._version, t.data_ptr()) for t in tensors]
    return conv.ws_eps, weight.dtype, weight.shape, weight.stride(), *own


@lru_cache(maxsize=1024)
def _places(shape: torch.Size, strides: tuple[int, ...]) -> Tensor:
    """Return places in memory such that every filter, every input channel and every position has one at least."""
    filters, channels, *sides = shape
    along = torch.arange(max(filters, channels, math.prod(sides)), device="cpu")
    positions = torch.unravel_index(along % math.prod(sides), sides)
    index = along % filters, along % channels, *positions
    return torch.stack([part * stride for part, stride in zip(index, strides, strict=True)]).sum(0)
