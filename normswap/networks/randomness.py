"""The random generators that a network's code may draw from: torch's, Python's and numpy's."""

import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RandomState:
    """Where every generator stands.

    Attributes:
        cpu: torch's generator.
        gpu: The generator of one GPU, where it matters, and which.
        python: The one of `random`.
        numpy: The one of ``numpy.random``, where numpy is imported.
    """

    cpu: Tensor
    gpu: tuple[Tensor, torch.device] | None
    python: tuple[Any, ...]
    numpy: tuple[Any, ...] | None

    @classmethod
    def now(cls, device: torch.device | None = None) -> Self:
        """Return the present state, with a GPU's where its device is given."""
        gpu = None if device is None or device.type != "cuda" else (torch.cuda.get_rng_state(device), device)
        return cls(torch.get_rng_state(), gpu, random.getstate(), _numpy().get_state() if _numpy() else None)

    def restore(self) -> None:
        """Set every generator back."""
        torch.set_rng_state(self.cpu)
        if self.gpu is not None:
            torch.cuda.set_rng_state(*self.gpu)
        random.setstate(self.python)
        if self.numpy is not None:
            _numpy().set_state(self.numpy)

    def equals(self, other: "RandomState") -> bool:
        """Tell whether nothing was drawn between two states."""
        pairs = [(self.cpu, other.cpu), *([(self.gpu[0], other.gpu[0])] if self.gpu and other.gpu else [])]
        numpy = all(bool((a == b).all() if hasattr(a, "all") else a == b) for a, b in self._numpy_pairs(other))
        return all(torch.equal(a, b) for a, b in pairs) and self.python == other.python and numpy

    def _numpy_pairs(self, other: "RandomState") -> Iterator[tuple[Any, Any]]:
        yield from zip(self.numpy or (), other.numpy or (), strict=False)


@contextmanager
def same_randomness(device: torch.device | None = None) -> Iterator[None]:
    """Leave every generator as it was before the block."""
    before = RandomState.now(device)
    try:
        yield
    finally:
        before.restore()


def seed_all(seed: int) -> None:
    """Have torch, Python and numpy draw the same numbers whenever they are given this seed."""
    torch.manual_seed(seed)
    random.seed(seed)
    if _numpy():
        _numpy().seed(seed)


def _numpy() -> Any:
    return sys.modules.get("numpy.random")


def normal(shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
    """Return numbers of mean 0 and deviation 1, the same ones whatever `torch.set_default_dtype` says."""
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def uniform(shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
    """Return numbers from 0 to 1, the same ones whatever `torch.set_default_dtype` says."""
    return torch.rand(shape, generator=generator, dtype=torch.float32)
