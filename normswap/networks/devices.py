"""Where tensors are made that name no device: normswap's own on the CPU, a network's own as its user has it."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

USERS: ContextVar[torch.device | None] = ContextVar("device that the user has set", default=None)


@contextmanager
def own_device() -> Iterator[None]:
    """Have tensors made on the CPU within the block, whatever `torch.set_default_device` says."""
    device = torch.get_default_device()
    if device.type == "cpu":
        yield
        return
    token = USERS.set(device)
    try:
        with torch.device("cpu"):
            yield
    finally:
        USERS.reset(token)


@contextmanager
def users_device() -> Iterator[None]:
    """Have tensors made as the user has set it within the block, for code of a network inside `own_device`."""
    device = USERS.get()
    if device is None:
        yield
        return
    with device:
        yield
