"""What the outputs make of each channel: one backward pass over a few samples."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from normswap.networks.hooks import watching
from normswap.networks.inputs import batch_size, call, fresh, rows_of, tensors_in
from normswap.networks.network import Network
from normswap.networks.processes import joined, processes, rank

SAMPLES, AT_ONCE = 32, 16
"""Samples of all processes together of which gradients are taken; and at once, as activations are kept for that."""

APART = 0.4
"""Share of what the outputs make of channels that counts for each by itself: of what they make of channels together, a
few samples leave ways open that others would close."""


class Importance:
    """How far the outputs move where a channel is shifted everywhere, by norm and channel.

    The outputs are mixed with random signs, anew for every sample: the mean square of what a shift of several channels
    does to the mixtures is that of all outputs' (Hutchinson's estimate of the Gauss-Newton matrix). A network through
    which no gradient passes has nothing to tell.

    Args:
        network: In eval mode; parameters and buffers stay as they are.
        names: Its norms.
        stepped: Those whose input is (T, N, C, *).
    """

    def __init__(self, network: Network, names: Iterable[str], stepped: Collection[str] = ()) -> None:
        self._model, self._stepped = network.model, stepped
        self._norms = {name: network.slots[name] for name in names}
        self._slopes: dict[str, list[Tensor]] = {}
        self._seen, self._able = 0, True

    def pieces(self, batch: Any) -> Iterator[tuple[Any, bool]]:
        """Yield a batch piece by piece, and whether to look at a piece: small ones first, then what is left.

        What could not be looked at comes again, with the rest.
        """
        size, start = max(batch_size(batch), 1), 0
        whole = not isinstance(batch, list) and all(
            isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == size for leaf in tree_leaves(batch)
        )
        step = max(min(SAMPLES // processes(), AT_ONCE), 1) if whole else size
        while self._able and self._seen * processes() < SAMPLES and start < size:
            yield rows_of(batch, slice(start, start + step)) if whole else batch, True
            start += step if self._able else 0
        if start < size:
            yield rows_of(batch, slice(start, None)) if start else batch, False

    def look(self, rows: Any) -> bool:
        """Run the network on samples and tell whether it runs with a history of what it computes."""
        try:
            with _following(self._model):
                slopes = _slopes(self._model, self._norms, rows, self._seen)
        except (Exception, SystemExit):  # whatever the network's own code does with such a history
            self._able = False
            return False
        for name, slope in slopes:
            slope = slope.flatten(0, 1) if name in self._stepped else slope
            moved = slope.double().sum(tuple(range(2, slope.ndim))) if slope.ndim > 2 else slope.double()
            self._slopes.setdefault(name, []).append(moved)
        self._seen += batch_size(rows)
        return True

    def found(self) -> dict[str, Tensor]:
        """Return the derivatives by the input of each norm, by name, of all processes.

        (M, C), a row for every sample, or C rows with the same products where that is less.
        """
        if not self._able:
            return {}
        rows = {name: joined(torch.cat(slopes)) for name, slopes in self._slopes.items()}
        return {name: _fewer(own) for name, own in rows.items() if bool(own.isfinite().all())}


def _fewer(rows: Tensor) -> Tensor:
    """Return no more rows than columns, R with ``Rᵀ·R = rowsᵀ·rows``."""
    count, channels = rows.shape
    return rows if count <= channels else torch.linalg.qr(rows.cpu(), mode="r").R.to(rows.device)


@contextmanager
def _following(model: nn.Module) -> Iterator[None]:
    """Have parameters make a history, frozen ones as well: gradients by activations pass through what they make."""
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _slopes(model: nn.Module, norms: Mapping[str, nn.Module], rows: Any, first: int) -> list[tuple[str, Tensor]]:
    """Return the derivatives of a mixture of the outputs by what the norms read, by name, call by call."""
    inputs: list[tuple[str, Tensor]] = []
    with watching(norms, lambda name, _norm, x: inputs.append((name, x)), attached=True):
        mixture = _mixture(tensors_in(call(model, fresh(rows))), first, batch_size(rows))
    followed = [(name, x) for name, x in inputs if x.requires_grad]
    if mixture is None or not followed:
        return []
    slopes = torch.autograd.grad(mixture, [x for _, x in followed], allow_unused=True)
    return [(name, slope) for (name, _), slope in zip(followed, slopes, strict=True) if slope is not None]


def _mixture(outputs: Iterable[Tensor], first: int, size: int) -> Tensor | None:
    """Return the outputs' sum with random signs, drawn by the number of each sample; None where none is a float."""
    terms = []
    for output in outputs:
        if not output.is_floating_point() or not output.requires_grad:
            continue
        rows = output if output.ndim and len(output) == size else output.unsqueeze(0)
        for number, row in enumerate(rows):
            generator = torch.Generator().manual_seed((first + number) * processes() + rank())
            signs = torch.randint(0, 2, row.shape, generator=generator).to(row) * 2 - 1
            terms.append((row * signs).sum())
    return torch.stack(terms).sum() if terms else None


def weighted(slopes: Tensor, gamma: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """Return what an error of the channels of B norms counts: together, (B, M, C), and (B, C) each by itself.

    An error e counts ``|rows·e|² + |own·e|²``. Channels that none of a few samples reached, behind a ReLU, may be
    needed by others, so that a tenth of γ² is added.

    Args:
        slopes: (B, M, C) derivatives by the norms' inputs; 0 throughout, or M = 0, for γ alone.
        gamma: (B, C) γ as it acts on x/unit.
        unit: (B, C) in which the moments of x are given.
    """
    if not slopes.shape[1]:
        return slopes.to(gamma), gamma
    largest = slopes.abs().amax((1, 2), keepdim=True)
    rows = torch.where(largest > 0, slopes / largest, 0).to(gamma) * unit.unsqueeze(1)
    power = rows.square().sum(1)
    level = power.mean(1, keepdim=True)
    rows, power = rows / level.sqrt().clamp_min(1e-30).unsqueeze(1), power / level.clamp_min(1e-30)
    by_gamma = gamma.square() / gamma.square().mean(1, keepdim=True).clamp_min(1e-30)
    return rows * (1 - APART) ** 0.5, torch.where(level > 0, (APART * power + 0.1 * by_gamma).sqrt(), gamma)
