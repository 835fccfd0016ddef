"""Results of operators on the meta device: shapes without torch's detours, made-up answers where data decides.

An operator whose result depends on values that a meta tensor does not have (``nonzero``, ``nms``) is answered with the
smallest result that lets the forward pass go on.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from normswap.tracing.operators import OTHER_NORMS

DECISIONS = frozenset(("local_scalar_dense", "is_nonzero", "equal"))
"""Operators that hand a value to Python, which may decide by it."""

ELEMENTWISE = frozenset(
    """add sub mul div relu relu6 hardtanh clamp clamp_min sigmoid hardsigmoid tanh silu hardswish gelu elu leaky_relu
    mish softplus log_sigmoid exp""".split()
)
"""Operators whose result has the shape that their operands broadcast to."""


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


def shape_alone(func: Any, name: str, args: tuple[Any, ...], operands: list[Tensor]) -> Any:
    """Return an empty result on the meta device for operators whose result's shape is plain, else NotImplemented.

    torch works these out in Python there, which takes most of the time of a pass without data.
    """
    first, schema = operands[0], func._schema
    if name in OTHER_NORMS and not torch.is_grad_enabled():  # a backward pass asks for the shapes of statistics, too
        extra = len(schema.returns) - 1
        result = torch.empty(first.shape, dtype=first.dtype, device="meta")
        return (result, *(torch.empty(0, device="meta") for _ in range(extra))) if extra > 0 else result
    if not first.is_floating_point() or any(tensor.dtype != first.dtype for tensor in operands):
        return NotImplemented
    if name == "convolution":
        shape = _convolved(*args)
    elif name in ELEMENTWISE:
        shapes = {tensor.shape for tensor in operands}
        shape = first.shape if len(shapes) == 1 else torch.broadcast_shapes(*shapes)
    else:
        return NotImplemented
    if schema.is_mutable:
        return first if first is args[0] and shape == first.shape else NotImplemented
    return NotImplemented if shape is None else torch.empty(shape, dtype=first.dtype, device="meta")


def _convolved(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> tuple[int, ...] | None:
    """Return the shape of a convolution's result; None where that takes a closer look, or an error."""
    filters, fan_in, *size = weight.shape
    per_axis = (input.shape[2:], size, stride, padding, dilation)
    fits = len({len(values) for values in per_axis}) == 1 and input.ndim == weight.ndim and not transposed
    if not fits or filters % groups or input.shape[1] != fan_in * groups or (bias is not None and len(bias) != filters):
        return None
    sides = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(*per_axis, strict=True)]
    return (len(input), filters, *sides) if min(sides) > 0 else None


ROWS = 2
"""Rows that an operator is said to have found. Saying "all" makes detection nets trace for most of a minute."""


def decision(name: str, operand: Tensor, *, yes: bool) -> Any:
    """Return a made-up value for an operator that hands one to Python, which may decide by it.

    Args:
        name: One of `DECISIONS`.
        operand: What it looks at.
        yes: Whether it is one, or true; else zero, or false.
    """
    if name != "local_scalar_dense" or operand.dtype is torch.bool:
        return yes
    return float(yes) if operand.dtype.is_floating_point else int(yes)


def _rows(tensor: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or tensor.dtype, device="meta")


def _index(tensor: Tensor, indices: list[Tensor | None], *_: Any) -> Tensor:
    """Index with boolean masks replaced by two rows of positions."""
    chosen: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype in (torch.bool, torch.uint8):
            chosen += [_rows(index, ROWS, dtype=torch.long) for _ in range(index.ndim)]
        else:
            chosen.append(index)
    result: Tensor = torch.ops.aten.index.Tensor(tensor, chosen)
    return result


def _unique(tensor: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _rows(tensor, ROWS), _rows(tensor, *tensor.shape, dtype=torch.long), _rows(tensor, ROWS, dtype=torch.long)


ANSWERS: dict[str, Callable[..., Any]] = {
    "nonzero": lambda tensor: _rows(tensor, ROWS, tensor.ndim, dtype=torch.long),
    "masked_select": lambda tensor, _: _rows(tensor, ROWS),
    "index": _index,
    "torchvision::nms": lambda boxes, *_: _rows(boxes, min(ROWS, boxes.shape[0]), dtype=torch.long),
    "unique2": _unique,
    "unique_dim": _unique,
    "unique_consecutive": _unique,
    "repeat_interleave": lambda repeats, **_: _rows(repeats, ROWS * repeats.shape[0]),
    "isnan": lambda tensor: torch.zeros((), dtype=torch.bool).expand(tensor.shape),
    "isinf": lambda tensor: torch.zeros((), dtype=torch.bool).expand(tensor.shape),
    "bincount": lambda tensor, *_, **__: _rows(tensor, ROWS, dtype=torch.long),
}
"""Made-up results for meta tensors, by base name: the smallest that let the forward pass go on."""

NEEDS_ANSWER = {"repeat_interleave": "repeat_interleave.Tensor"}
"""Operators of which only one overload depends on data."""


def answer(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return a made-up result for an operator that depends on data no meta tensor has, else NotImplemented."""
    if name not in ANSWERS or (name in NEEDS_ANSWER and NEEDS_ANSWER[name] not in str(func)):
        return NotImplemented
    if name == "index" and not any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
        return NotImplemented
    return ANSWERS[name](*args, **kwargs)
