"""Notice what a tool writes into the weight of a frozen layer, as it does that merges an adapter."""

import dis
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType, FrameType
from typing import Self

import torch
from torch import Tensor

HARMLESS = frozenset(
    """device dim dtype element_size get_device grad is_contiguous is_cpu is_cuda is_floating_point is_meta layout ndim
    nelement new_empty new_full new_ones new_tensor new_zeros numel requires_grad requires_grad_ shape size
    stride""".split()
)
"""Attributes of a tensor through which nothing is written to it."""


REPLACES = frozenset("copy_ lerp_ mul_".split())
"""Methods of ``.data`` by which another network's filters are taken, or averaged in; what is merged is added."""

LOADS = ("LOAD_ATTR", "LOAD_METHOD")
"""Instructions that take an attribute."""

TESTS = ("POP_JUMP", "JUMP_IF", "TO_BOOL", "UNARY_NOT")
"""Instructions that take the truth of what they get, as behind ``hasattr``; a weight has none."""


def may_merge(asking: FrameType, *, merged: bool) -> bool:
    """Tell whether code that asks for a weight may go on to merge something into it; much takes a size or a type.

    Args:
        asking: The frame of the code, at the instruction that asks.
        merged: Whether something has been merged before: what is copied then undoes that.
    """
    return _may_merge(asking.f_code, asking.f_lasti, merged)


@lru_cache(maxsize=4096)
def _may_merge(code: CodeType, place: int, merged: bool) -> bool:
    """Tell whether the instructions behind a place are ones by which something may be added to what they get."""
    steps = list(dis.get_instructions(code))
    at = max(index for index, step in enumerate(steps) if step.offset <= place)
    at += steps[at].opname == "PRECALL"  # of Python 3.11; CALL follows
    one, then, *_ = [*steps[at + 1 : at + 3], None, None]
    if one is None or one.opname.startswith(TESTS):
        return one is None
    if one.opname == "LOAD_CONST" and one.argval is None and then is not None:
        return then.opname != "IS_OP"
    if one.opname not in LOADS:
        return True
    if not merged and one.argval == "data" and then is not None and then.opname in LOADS and then.argval in REPLACES:
        return False
    return one.argval not in HARMLESS


@dataclass(frozen=True)
class Seen:
    """A frozen weight as it was when code that may write to it asked a layer for it by name.

    Training reaches parameters through an optimizer, averaging and loading through state dicts; all of these count the
    changes of a tensor. A merge asks the layer for ``weight``, of which it needs no gradient, and writes through
    ``.data``, which counts nothing.

    Attributes:
        weight: The parameter itself.
        version: How often it had been changed.
        values: A copy of what it held.
    """

    weight: Tensor
    version: int
    values: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> Self | None:
        """Note a frozen weight; None where it holds nothing that could be compared."""
        if weight.is_meta or weight.is_inference():
            return None
        return cls(weight, weight._version, weight.detach().clone())

    def holds_for(self, weight: Tensor) -> bool:
        """Tell whether nothing that torch counts has changed the weight since."""
        return weight is self.weight and weight._version == self.version

    @torch.no_grad()
    def added(self) -> Tensor | None:
        """Return what has been added to the weight past torch's count, in its shape; None where nothing has."""
        now = self.weight.detach()
        if now.shape != self.values.shape:
            return None
        before = self.values.to(now)
        return None if torch.equal(now, before) else now - before
