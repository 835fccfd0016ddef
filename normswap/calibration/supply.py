"""Made-up inputs beside the images, so that a few hundred images are not learned by heart."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from normswap.networks.processes import joined, own_rows
from normswap.planning.synthetic import synthetic

PASSES = 4
"""Images that are gone through more often than this are helped out by made-up ones."""

POOL = 256
"""Made-up inputs that are drawn from; mixed with images and with each other no two batches are alike."""


def with_made_up(batches: Iterable[Any], *, seed: int) -> Iterator[Any]:
    """Yield the batches with a made-up input in the place of every second sample, drawn at random.

    The teacher answers any input. Made-up ones get the mean and the deviation that the first batch has in each channel.
    Batches that are no floating tensors (N, C, *) with one to three axes of positions pass as they are. Where processes
    work together, all their samples count as one batch.

    Args:
        batches: To learn from, of one size.
        seed: Of the made-up inputs and of the places, alike in all processes.
    """
    generator = torch.Generator().manual_seed(seed)
    pools: dict[torch.Size, Tensor] = {}
    for batch in batches:
        if not isinstance(batch, Tensor) or not batch.is_floating_point() or not 3 <= batch.ndim <= 5:
            yield batch
            continue
        if batch.shape[1:] not in pools:
            pools[batch.shape[1:]] = _pool(batch, seed)
        pool = pools[batch.shape[1:]]
        count = len(joined(batch.new_empty(len(batch))))
        replaced = own_rows(torch.randperm(count, generator=generator) < count // 2)
        drawn = own_rows(torch.randint(len(pool), (count,), generator=generator))
        batch = batch.clone()
        batch[replaced.to(batch.device)] = pool[drawn[replaced]].to(batch)
        yield batch


def _pool(batch: Tensor, seed: int) -> Tensor:
    """Return (POOL, C, *) made-up inputs with the batch's mean and deviation in each channel."""
    values = joined(batch).transpose(0, 1).flatten(1).float()
    made = torch.cat(list(synthetic(tuple(batch.shape[1:]), count=POOL, seed=seed)))
    axes = (1, -1, *(1 for _ in batch.shape[2:]))
    return torch.addcmul(values.mean(1).cpu().view(axes), made, values.std(1).cpu().view(axes))
