"""What the outputs make of each channel: one backward pass over a few samples."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from normswap.networks.hooks import watching
from normswap.networks.inputs import batch_size, call, fresh, rows_of, tensors_in
from normswap.networks.network import Network
from normswap.networks.processes import processes, rank, summed

SAMPLES, AT_ONCE = 32, 16
"""Samples of which gradients are taken, and how many of them at once: their activations are kept for the backward."""


def importance(network: Network, names: Iterable[str], batches: Iterable[Any]) -> dict[str, Tensor]:
    """Return how far the outputs move where a channel is shifted everywhere, by norm and channel.

    The outputs are mixed with random signs, anew for every sample: the mean square of the mixture's derivative is that
    of all outputs' (Hutchinson's estimate of the Gauss-Newton matrix' diagonal). A network through which no gradient
    passes has nothing to tell.

    Args:
        network: In eval mode; parameters and buffers stay as they are.
        names: Its norms.
        batches: Example inputs.

    Returns:
        (C,) root mean square derivatives by the input of each norm, by name.
    """
    sums: dict[str, Tensor] = {}
    watched = {name: network.slots[name] for name in names}
    with torch.compiler.set_stance("force_eager"), _following(network.model):
        for first, rows in _few_rows(batches):
            try:
                slopes = _slopes(network.model, watched, rows, first)
            except Exception:  # whatever the network's own code does with a history of what it computes
                return {}
            for name, slope in slopes:
                moved = slope.double().sum(tuple(range(2, slope.ndim))) if slope.ndim > 2 else slope.double()
                sums[name] = sums[name] + moved.square().sum(0) if name in sums else moved.square().sum(0)
    return {name: summed(value).sqrt() for name, value in sums.items() if bool(value.isfinite().all())}


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


def _few_rows(batches: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    """Yield pieces of batches, as many samples as it takes, each with the number of its first sample."""
    seen = 0
    for batch in batches:
        size = batch_size(batch)
        whole = not isinstance(batch, list) and all(
            isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == size for leaf in tree_leaves(batch)
        )
        for start in range(0, size, AT_ONCE) if whole else (0,):
            if seen * processes() >= SAMPLES:
                return
            piece = rows_of(batch, slice(start, start + AT_ONCE)) if whole else batch
            yield seen, piece
            seen += batch_size(piece)


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


def weighted(importance: Tensor | None, gamma: Tensor, unit: Tensor) -> Tensor:
    """Return the (C,) weights of a norm's channels: what the outputs make of them, and a tenth of what γ does.

    Channels that none of a few samples reached, behind a ReLU, may be needed by others.

    Args:
        importance: (C,) root mean square derivatives by the norm's input; None for γ alone.
        gamma: (C,) γ as it acts on x/unit.
        unit: (C,) in which the moments of x are given.
    """
    if importance is None or not bool(importance.any()):
        return gamma
    moved = (importance.to(gamma) * unit).square()
    return (moved / moved.mean() + 0.1 * gamma.square() / gamma.square().mean().clamp_min(1e-30)).sqrt()
