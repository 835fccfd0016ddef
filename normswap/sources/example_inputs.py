"""Read an example input that a user names on the command line: what a function returns, or what a file holds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from normswap.errors import CheckpointError, InvalidOption
from normswap.sources.opening import FACTORY, result_of
from normswap.sources.state_dicts import read_tensors

WANTED = "a tensor, a tuple of arguments, or a dict of keyword arguments"


def read_example(name: str) -> Any:
    """Return what a network is to be called with.

    >>> read_example("package.module:batch")
    >>> read_example("batch.pt")  # of torch.save((images, lengths), "batch.pt"); in safetensors, keyword arguments

    Args:
        name: ``package.module:function``, called without arguments, or the path of a file; nothing in it is executed.

    Raises:
        UnknownModel: There is no such function.
        UnsupportedModel: It failed.
        InvalidOption: There is no such file, it holds more than tensors, or this is nothing to call a network with.
    """
    if FACTORY.fullmatch(name):
        value = result_of(name)
    else:
        try:
            value = read_tensors(Path(name))
        except CheckpointError as error:
            what = str(error).rpartition("; ")[0]
            raise InvalidOption(
                f"--input-from {what}; it takes package.module:function, or a file of tensors"
            ) from error
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    if not isinstance(value, Tensor) and not len(items):
        raise InvalidOption(f"--input-from {name} gives {_said(value)}; it must be {WANTED}")
    return value


def _said(value: Any) -> str:
    if value is None:
        return "nothing"
    return f"{'an empty' if isinstance(value, (list, tuple, Mapping)) else 'a'} {type(value).__name__}"
