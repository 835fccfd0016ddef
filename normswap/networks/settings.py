"""Settings of torch that the user has made: they are for the network's own code, and not for normswap's numbers."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch

AUTOCAST = ("cpu", "cuda", "mps", "xpu")
"""Devices for which the user may have set a lower precision."""

Setting = Callable[[], AbstractContextManager[Any]]

USERS: ContextVar[tuple[Setting, ...]] = ContextVar("what the user has set", default=())


@contextmanager
def own_settings() -> Iterator[None]:
    """Have tensors made on the CPU within the block, in full precision, and such as can be trained.

    Whatever `torch.set_default_device` says, ``torch.autocast``, ``torch.no_grad`` and ``torch.inference_mode``, in
    which torch makes tensors of which no gradient can ever be recorded.
    """
    device = torch.get_default_device()
    users = list[Setting]()
    with ExitStack() as own:
        if not torch.is_grad_enabled():
            own.enter_context(torch.inference_mode(False))  # which turns gradients on, too
        if device.type != "cpu":
            users.append(lambda: device)
            own.enter_context(torch.device("cpu"))
        for kind in filter(torch.is_autocast_enabled, AUTOCAST):
            users.append(partial(torch.autocast, kind, torch.get_autocast_dtype(kind)))
            own.enter_context(torch.autocast(kind, enabled=False))
        if users:
            own.callback(USERS.reset, USERS.set(tuple(users)))
        yield


@contextmanager
def users_settings() -> Iterator[None]:
    """Have the user's device and precision within the block, for code of a network inside `own_settings`."""
    with ExitStack() as users:
        for setting in USERS.get():
            users.enter_context(setting())
        yield
