"""Example inputs: calling with them, their samples, and their shapes as data."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from normswap.limits import MAX_SIDE


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


def as_call(example_input: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword arguments: a tuple is positional arguments, a dict keyword arguments."""
    if isinstance(example_input, tuple):
        return example_input, {}
    if isinstance(example_input, Mapping):
        return (), dict(example_input)
    return (example_input,), {}


def call(model: nn.Module, example_input: Any) -> Any:
    """Return the model's output for a tensor, a tuple of positional arguments or a dict of keyword arguments."""
    args, kwargs = as_call(example_input)
    return model(*args, **kwargs)


def batch_size(value: Any) -> int:
    """Return how many samples an example holds: the length of a list, or the first size of the first tensor."""
    if isinstance(value, list):
        return len(value)
    if isinstance(value, Tensor):
        return value.shape[0] if value.ndim else 1
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple) else ()
    return batch_size(next(iter(items))) if items else 1


def fresh(value: Any) -> Any:
    """Return nested tensors as copies, which a forward pass may change in place."""
    return tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), value)


def materialize(value: Any, device: torch.device, dtype: torch.dtype, *, seed: int, count: int = 0) -> Any:
    """Return tensors of the same shapes with random normal floats, of `dtype` where float32.

    Whole numbers and truth values are tokens, lengths and masks: those that are known stay, others become `count`.
    """
    generator = torch.Generator().manual_seed(seed)

    def made(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            unknown = torch.full(tensor.shape, count, dtype=tensor.dtype, device=device) if tensor.is_meta else tensor
            return unknown.clone().to(device)
        kind = dtype if tensor.dtype is torch.float32 else tensor.dtype
        return torch.randn(tensor.shape, generator=generator).to(device, kind)

    return tree_map_only(Tensor, made, value)


def vary(value: Any, batch: int, *, seed: int) -> Any:
    """Return the example with every sample but the first replaced by another random one."""
    generator = torch.Generator().manual_seed(seed)

    def other(tensor: Tensor) -> Tensor:
        noise = torch.randn(tensor.shape, generator=generator).to(tensor.device, tensor.dtype)
        return noise if tensor.is_floating_point() else tensor

    if isinstance(value, tuple):
        return tuple(vary(item, batch, seed=seed) for item in value)
    if isinstance(value, list):
        return [*value[:1], *(tree_map_only(Tensor, other, item) for item in value[1:])]
    return tree_map_only(
        Tensor, lambda t: torch.cat([t[:1], other(t[1:])]) if t.ndim and t.shape[0] == batch else t, value
    )


def describe(value: Any) -> Any:
    """Return example inputs as JSON data: shapes and types, no values. None where a part is no tensor or container."""
    if isinstance(value, Tensor):
        return {"tensor": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, (list, tuple)):
        items = [describe(item) for item in value]
        return None if None in items else {type(value).__name__: items}
    if isinstance(value, Mapping):
        fields = {str(key): describe(item) for key, item in value.items()}
        return None if None in fields.values() else {"dict": fields}
    return None


def rebuild(spec: Any) -> Any:
    """Return meta tensors in the containers that `describe` recorded.

    Raises:
        ValueError: The data is not what `describe` writes.
    """
    if not isinstance(spec, dict) or not spec:
        raise ValueError(f"an example input cannot be {spec!r}")
    if "tensor" in spec:
        dtype = getattr(torch, str(spec.get("dtype")), None)
        shape = spec["tensor"]
        if not isinstance(dtype, torch.dtype) or not all(isinstance(n, int) and 0 <= n < MAX_SIDE for n in shape):
            raise ValueError(f"{spec!r} is not a tensor's shape and dtype")
        return torch.empty(shape, dtype=dtype, device="meta")
    ((kind, items),) = spec.items()
    if kind == "dict":
        return {key: rebuild(item) for key, item in items.items()}
    if kind in ("list", "tuple"):
        return [rebuild(item) for item in items] if kind == "list" else tuple(rebuild(item) for item in items)
    raise ValueError(f"{kind!r} is not a container of example inputs")
