"""Notice what a tool writes into the weight of a frozen layer, as it does that merges an adapter."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Seen:
    """A frozen weight as it was when code asked a layer for it by name.

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
