"""Work on a device, and together with other processes where there are any, as `torch.distributed` is set up."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from normswap.errors import InvalidOption, first_line


def device_named(text: str | None) -> torch.device:
    """Return the device that a user names; by default CUDA where there is one, under ``torchrun`` each process' own.

    Raises:
        InvalidOption: There is no such device here.
    """
    own = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(text or own)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InvalidOption(
            f"device {text!r} cannot be used here ({first_line(error)}); leave it out, or name another"
        ) from error
    return device


@contextmanager
def torchrun(device: torch.device) -> Iterator[None]:
    """Join the processes that ``torchrun`` started, over nccl on CUDA and gloo elsewhere, and part afterwards."""
    if int(os.environ.get("WORLD_SIZE", 1)) < 2 or processes() > 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
        dist.barrier()
    finally:
        dist.destroy_process_group()


def processes() -> int:
    """Return how many processes work together; 1 where none was set up."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def first_process() -> bool:
    """Tell whether this is the first process of those that ``torchrun`` started, which it is alone, too."""
    return os.environ.get("RANK", "0") == "0"


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
