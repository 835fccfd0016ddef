"""Find and replace tensors in nested arguments and results."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def tensors_in(value: Any) -> Iterable[Tensor]:
    """Yield every tensor in nested tuples, lists, dicts and objects with attributes such as dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            if isinstance(item, Tensor):
                yield item
            elif type(item) not in (int, float, bool):
                yield from tensors_in(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif hasattr(value, "__dataclass_fields__"):
        for key in value.__dataclass_fields__:
            yield from tensors_in(getattr(value, key))


def all_meta(value: Any, operands: list[Tensor]) -> Any:
    """Return `value` with tensors that hold data replaced by meta twins, so that they mix with meta operands."""
    if all(tensor.is_meta or tensor.ndim == 0 for tensor in operands):
        return value
    if isinstance(value, Tensor):
        return value if value.is_meta or value.ndim == 0 else torch.empty_like(value, device="meta")
    if isinstance(value, (list, tuple)):
        return type(value)(all_meta(item, operands) for item in value)
    if isinstance(value, dict):
        return {key: all_meta(item, operands) for key, item in value.items()}
    return value
