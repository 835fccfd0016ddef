"""Work together with other processes, where there are any: `torch.distributed` as the user has set it up."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def processes() -> int:
    """Return how many processes work together; 1 where none was set up."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return this process' place among them."""
    return dist.get_rank() if processes() > 1 else 0


def summed(values: Tensor) -> Tensor:
    """Return the sum of a tensor over the processes."""
    if processes() > 1:
        values = values.contiguous()
        dist.all_reduce(values)
    return values


def joined(values: Tensor) -> Tensor:
    """Return the rows of all processes, in turns as a `DistributedSampler` deals them out; as many from each."""
    if processes() == 1:
        return values
    least = torch.tensor(len(values), device=values.device)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    values = values[: int(least)].contiguous()
    parts = [torch.empty_like(values) for _ in range(processes())]
    dist.all_gather(parts, values)
    return torch.stack(parts, 1).flatten(0, 1)


def averaged(values: Sequence[Tensor]) -> None:
    """Replace tensors by their mean over the processes."""
    if processes() > 1 and values:
        flat = torch.cat([value.flatten() for value in values])
        dist.all_reduce(flat)
        for value, part in zip(values, flat.split([value.numel() for value in values]), strict=True):
            value.copy_(part.view_as(value) / processes())


def own_rows(values: Tensor) -> Tensor:
    """Return this process' rows of what `joined` returned."""
    return values[rank() :: processes()]
