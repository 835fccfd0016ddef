"""BatchNorm that a network keeps where torch does not see it: in plain lists, tuples and dicts."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from normswap.errors import UnsupportedModel
from normswap.networks.recognition import is_batch_norm

REGISTERED = ("_modules", "_parameters", "_buffers")
DEPTH = 4
"""Containers within containers that are looked into."""


def stray_norms(model: nn.Module) -> list[str]:
    """Return the attributes, by qualified name, that hold BatchNorm which is no part of the network's modules."""
    registered = {id(module) for module in model.modules()}
    return [
        f"{name}.{key}".lstrip(".")
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if (isinstance(value, nn.Module) or (isinstance(value, (list, tuple, dict)) and value))
        and key not in REGISTERED
        and any(
            id(held) not in registered and any(is_batch_norm(inner) for inner in held.modules())
            for held in _modules_in(value, DEPTH)
        )
    ]


def refuse_strays(model: nn.Module) -> None:
    """Raise where a network holds BatchNorm that no replacement could reach.

    Raises:
        UnsupportedModel: With the attribute that holds it.
    """
    for where in stray_norms(model):
        raise UnsupportedModel(
            f"{where} keeps BatchNorm where torch does not register it, so that it is neither saved, moved nor "
            "converted; use nn.ModuleList or nn.ModuleDict"
        )


def _modules_in(value: Any, depth: int) -> Iterator[nn.Module]:
    if isinstance(value, nn.Module):
        yield value
    elif depth and isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _modules_in(item, depth - 1)
