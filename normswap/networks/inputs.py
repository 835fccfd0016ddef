"""Example inputs: calling with them, their samples, and their shapes as data."""

import inspect
import math
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from itertools import chain
from types import FunctionType, MethodType, ModuleType, NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader

from normswap.errors import InvalidOption
from normswap.limits import MAX_SIDE
from normswap.networks.randomness import normal, uniform
from normswap.networks.settings import users_settings

FEW_VALUES = 2**16
"""Values of a tensor of whole numbers that are recorded where they are alike."""

ATOMS = (int, float, bool, complex, str, bytes, NoneType, Enum, torch.dtype, torch.device, torch.layout)
"""What holds nothing else."""


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield every tensor in nested containers and in objects with attributes."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            if isinstance(item, Tensor):
                yield item
            elif type(item) not in ATOMS:
                yield from tensors_in(item)
    elif type(value) not in ATOMS:
        yield from (leaf for leaf in leaves_in(value) if isinstance(leaf, Tensor))


def leaves_in(value: Any, *, above: tuple[int, ...] = ()) -> Iterator[Any]:
    """Yield what nested containers and objects with attributes hold: tensors, numbers, what cannot be looked into.

    Args:
        value: A network's input or output.
        above: Containers, by ``id``, that hold the value: some hold themselves.
    """
    items = None if isinstance(value, (Tensor, *ATOMS)) else _held(value)
    if items is None:
        yield value
    elif id(value) not in above:
        for item in items:
            yield from leaves_in(item, above=(*above, id(value)))


def cannot_be_seen(leaf: Any) -> bool:
    """Tell whether one of `leaves_in` is no data: a generator, a function, a module."""
    return not isinstance(leaf, (Tensor, *ATOMS, np.ndarray, np.generic))


def _held(value: Any) -> Iterable[Any] | None:
    """Return what a container or an object holds; None where it cannot be looked into."""
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return list(value)
    if isinstance(value, (type, nn.Module, ModuleType, FunctionType, MethodType, partial, np.ndarray, np.generic)):
        return None
    names = [name for kind in type(value).__mro__ for name in _slots(kind)]
    found = [getattr(value, name) for name in names if hasattr(value, name)]
    own = getattr(value, "__dict__", None)
    return None if own is None and not names else [*found, *(own or {}).values()]


def _slots(kind: type) -> tuple[str, ...]:
    names = vars(kind).get("__slots__", ())
    return (names,) if isinstance(names, str) else tuple(name for name in names if not name.startswith("__"))


def as_call(example_input: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword arguments: a tuple is positional arguments, a dict keyword arguments."""
    if isinstance(example_input, tuple):
        return example_input, {}
    if isinstance(example_input, Mapping):
        return (), dict(example_input)
    return (example_input,), {}


def readings(value: Any, model: nn.Module) -> Iterator[Any]:
    """Yield what a value may be to a network, likeliest first: itself, a loader's batch, inputs without labels.

    A loader is asked for its first batch. A batch that is a list is inputs, then labels; a dict may hold what the
    forward has no parameter for. Which reading is right is for a forward pass to show.

    Raises:
        InvalidOption: A loader gives no batch.
    """
    if isinstance(value, DataLoader):
        value = next(iter(value), None)
        if value is None:
            raise InvalidOption("example_input= is a loader without a batch; pass one that gives samples")
        if isinstance(value, tuple):
            value = list(value)
    yield value
    if isinstance(value, list) and value:
        yield value[0]
        yield tuple(value)
        yield from (tuple(value[:count]) for count in range(len(value) - 1, 1, -1))
    elif isinstance(value, Mapping):
        parameters = inspect.signature(model.forward).parameters
        known = {key: item for key, item in value.items() if key in parameters}
        if known and len(known) < len(value):
            yield known
        if len(value) > 1:  # one entry of another name is a slip
            yield from (item for item in value.values() if isinstance(item, Tensor) and item.is_floating_point())
        yield (value,)


def call(model: nn.Module, example_input: Any) -> Any:
    """Return the model's output for a tensor, a tuple of positional arguments or a dict of keyword arguments."""
    args, kwargs = as_call(example_input)
    with users_settings():
        return model(*args, **kwargs)


@dataclass(frozen=True)
class Samples:
    """How an example holds its samples.

    Attributes:
        count: How many there are.
        listed: Whether a list holds one in each item, as detection networks take images; else every tensor's first
            axis runs over them.
    """

    count: int
    listed: bool = False


def samples_in(value: Any, shapes: Iterable[tuple[int, ...]] = ()) -> Samples:
    """Tell how an example holds its samples.

    A list of tensors is a list of samples, or one of feature maps that hold all samples each: what the network made of
    them tells, else whether the tensors have an axis more than images.

    Args:
        value: The example.
        shapes: Shapes of what the network's modules made of it.
    """
    if isinstance(value, Tensor):
        return Samples(value.shape[0] if value.ndim else 1)
    if isinstance(value, list):
        return _samples_in_list(value, shapes)
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple) else ()
    return samples_in(next(iter(items)), shapes) if items else Samples(1)


def _samples_in_list(items: list[Any], shapes: Iterable[tuple[int, ...]]) -> Samples:
    sizes = {item.shape[0] if isinstance(item, Tensor) and item.ndim else None for item in items}
    size = next(iter(sizes)) if len(sizes) == 1 else None
    if size is None:
        return Samples(len(items), listed=True)
    seen = Counter(shape[0] for shape in shapes if len(shape) > 1)
    if size != len(items) and seen[size] != seen[len(items)]:
        maps = seen[size] > seen[len(items)]
    else:
        maps = all(item.ndim > 3 for item in items)
    return Samples(size) if maps else Samples(len(items), listed=True)


def batch_size(value: Any) -> int:
    """Return how many samples an example holds."""
    return samples_in(value).count


def rows_of(value: Any, rows: slice) -> Any:
    """Return the given samples of every tensor in an example."""
    return tree_map_only(Tensor, lambda tensor: tensor[rows], value)


def fresh(value: Any) -> Any:
    """Return nested tensors as copies, which a forward pass may change in place."""
    return tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), value)


def reference(model: nn.Module) -> Tensor:
    """Return a tensor of the type and on the device that a network computes with."""
    tensors = chain(model.parameters(), model.buffers())
    return next((tensor for tensor in tensors if tensor.is_floating_point()), torch.empty(0))


def materialize(value: Any, device: torch.device, dtype: torch.dtype, *, seed: int, count: int = 0) -> Any:
    """Return tensors of the same shapes with random normal floats, of `dtype` where float32.

    Whole numbers and truth values are tokens, lengths and masks: those that are known stay, others become `count`.
    Floats stay where `says_something` of them.
    """
    generator = torch.Generator().manual_seed(seed)

    def made(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            unknown = torch.full(tensor.shape, count, dtype=tensor.dtype, device=device) if tensor.is_meta else tensor
            return unknown.clone().to(device)
        kind = dtype if tensor.dtype is torch.float32 else tensor.dtype
        if says_something(tensor):
            return tensor.detach().clone().to(device, kind)
        if tensor.is_meta and tensor.ndim == 1:  # shares of a length, times, levels of noise
            return uniform(tensor.shape, generator).to(device, kind)
        return normal(tensor.shape, generator).to(device, kind)

    return tree_map_only(Tensor, made, value)


def says_something(tensor: Tensor) -> bool:
    """Tell whether the values of floats matter: one number a sample (a length, a time, a level of noise), or a mask.

    Those of a sparse tensor are where they are for a reason. Values that are all zero, or not finite, are placeholders.
    """
    if tensor.layout is not torch.strided:
        return True
    if tensor.is_meta or not tensor.numel():
        return False
    if tensor.ndim < 2:
        return bool(tensor.any()) and bool(tensor.isfinite().all())
    ones = tensor == 1
    return bool(ones.any()) and bool((ones ^ (tensor == 0)).all()) and not bool(ones.all())


def may_name_samples(value: Any, samples: Samples) -> bool:
    """Tell whether numbers of an example could be the places of its samples, as the edges of a graph are."""
    if any(tensor.layout is not torch.strided for tensor in tensors_in(value)):
        return True
    whole = (t for t in tensors_in(value) if not (t.is_floating_point() or t.is_complex() or t.dtype is torch.bool))
    return any(not t.is_meta and t.numel() and 0 <= int(t.max()) < samples.count for t in whole)


def has_other_axes(value: Any, samples: Samples) -> bool:
    """Tell whether a tensor of an example may hold the samples on another axis than the first, as RNNs take states."""
    return samples.count > 1 and any(
        tensor.ndim > 1 and tensor.shape[0] != samples.count and samples.count in tensor.shape[1:]
        for tensor in tensors_in(value)
    )


def vary(value: Any, samples: Samples, *, seed: int) -> Any:
    """Return the example with every sample but the first replaced by another random one."""
    generator = torch.Generator().manual_seed(seed)

    def other(tensor: Tensor) -> Tensor:
        noise = normal(tensor.shape, generator).to(tensor.device, tensor.dtype)
        return noise if tensor.is_floating_point() else tensor

    def rows(tensor: Tensor) -> Tensor:
        has_rows = tensor.ndim and tensor.shape[0] == samples.count and not says_something(tensor)
        return torch.cat([tensor[:1], other(tensor[1:])]) if has_rows else tensor

    if isinstance(value, tuple):
        return tuple(vary(item, samples, seed=seed) for item in value)
    if samples.listed and isinstance(value, list):
        return [*value[:1], *(tree_map_only(Tensor, other, item) for item in value[1:])]
    return tree_map_only(Tensor, rows, value)


def first_sample(value: Any, samples: Samples) -> Any:
    """Return the example with its first sample alone."""
    if isinstance(value, tuple):
        return tuple(first_sample(item, samples) for item in value)
    if samples.listed and isinstance(value, list):
        return value[:1]

    def first(tensor: Tensor) -> Tensor:
        has_rows = tensor.layout is torch.strided and tensor.ndim and tensor.shape[0] == samples.count
        return tensor[:1] if has_rows else tensor

    return tree_map_only(Tensor, first, value)


def two_samples(value: Any) -> Any:
    """Return an example of one sample with that sample twice; others, and lists of samples, as they are."""
    samples = samples_in(value)
    if samples.count != 1 or samples.listed:
        return value

    def twice(tensor: Tensor) -> Tensor:
        return torch.cat([tensor, tensor]) if tensor.ndim and tensor.shape[0] == 1 else tensor

    return tree_map_only(Tensor, twice, value)


def describe(value: Any) -> Any:
    """Return example inputs as JSON data: shapes, types, and whole numbers that are all alike, as lengths often are.

    None where a part is sparse, or no tensor or container.
    """
    if isinstance(value, Tensor):
        if value.layout is not torch.strided:
            return None
        common = _common_value(value)
        kind = {"tensor": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        return kind if common is None else {**kind, "value": common}
    if isinstance(value, (list, tuple)):
        items = [describe(item) for item in value]
        return None if None in items else {type(value).__name__: items}
    if isinstance(value, Mapping):
        fields = {str(key): describe(item) for key, item in value.items()}
        return None if None in fields.values() else {"dict": fields}
    return None


def _common_value(tensor: Tensor) -> int | None:
    """Return the whole number that all of a few values are."""
    few = not tensor.is_meta and 0 < tensor.numel() <= FEW_VALUES
    if not few or tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool:
        return None
    first = int(tensor.flatten()[0])
    return first if abs(first) < MAX_SIDE and bool((tensor == first).all()) else None


def rebuild(spec: Any) -> Any:
    """Return meta tensors in the containers that `describe` recorded, and whole numbers with the value that it did.

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
        if type(value := spec.get("value")) is int and math.prod(shape) <= FEW_VALUES:
            return torch.full(shape, value, dtype=dtype)
        return torch.empty(shape, dtype=dtype, device="meta")
    ((kind, items),) = spec.items()
    if kind == "dict":
        return {key: rebuild(item) for key, item in items.items()}
    if kind in ("list", "tuple"):
        return [rebuild(item) for item in items] if kind == "list" else tuple(rebuild(item) for item in items)
    raise ValueError(f"{kind!r} is not a container of example inputs")
