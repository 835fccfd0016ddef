"""Weight standardization as tensor maths: tensors in, tensors out (Qiao et al. 2019, arXiv 1903.10520, equation 2)."""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

EPS = 1e-6
"""Added to the variance inside the root, as timm's ``StdConv2d`` does: a constant filter has a finite gradient."""

BLOCK = 2**18
"""Values that are looked at together where only statistics are wanted."""

ROUNDING, NEARLY = 8, 1e-2
"""Difference between filters that may be rounding, in epsilons of their type, and one that a decay may make."""

FORMULA = "(w - mean) / sqrt(var_biased + eps)"
"""The formula, as recorded in checkpoints."""


def by_filter(weight: Tensor, *, transposed: bool = False, groups: int = 1) -> Tensor:
    """Return the weight as (out_channels, *), one filter after the other, in the order in which it lies in memory.

    A convolution's weight is (out, in/groups, *kernel), a transposed one's (in, out/groups, *kernel).
    """
    if transposed:
        return _swap_channels(weight, groups)
    order = _order(weight)
    return weight if order is None else weight.permute(order)


def filters(weight: Tensor, *, transposed: bool = False, groups: int = 1) -> Tensor:
    """Return the weight as (out_channels, fan_in): `by_filter` with one row per filter."""
    return by_filter(weight, transposed=transposed, groups=groups).flatten(1)


def kernel(rows: Tensor, like: Tensor, *, transposed: bool = False, groups: int = 1) -> Tensor:
    """Undo `filters` or `by_filter`: (out_channels, *) becomes a weight of the shape and memory format of `like`."""
    if transposed:
        shape = like.shape
        return _swap_channels(rows.view(shape[1] * groups, shape[0] // groups, *shape[2:]), groups)
    order = _order(like)
    if order is None:
        return rows.view(like.shape)
    return rows.view([like.shape[axis] for axis in order]).permute([order.index(axis) for axis in range(like.ndim)])


def standardize(rows: Tensor, eps: float = EPS, *, gain: Tensor | None = None, offset: Tensor | None = None) -> Tensor:
    """Give every filter zero mean and unit variance, then scale and shift it; (out_channels, *) to the same shape.

    Statistics are float32 for half-precision filters; the biased variance is used and `eps` is inside the root. To the
    kernel a filter is a group of its own in one sample, which makes all of this one fused pass that has a derivative of
    every order. A compiler makes a pass of its own from the formula.

    Args:
        rows: Filters.
        eps: Added to the variance.
        gain: (out_channels,), 1 where left out.
        offset: (out_channels,), 0 where left out.
    """
    rows = _at_least_float32(rows)
    # the backward pass keeps a copy of the gain: DistributedDataParallel writes to buffers before every forward pass
    gain, offset = (None if value is None else value.to(rows.dtype, copy=value is gain) for value in (gain, offset))
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        return _written_out(rows, eps, gain, offset)
    flat = rows.flatten(1)
    return torch.group_norm(flat[None], len(flat), gain, offset, eps).reshape(rows.shape)


def _written_out(rows: Tensor, eps: float, gain: Tensor | None, offset: Tensor | None) -> Tensor:
    """Standardize on the axes as they are.

    A compiler that lays kernels out channels last would find the place of every value of a flattened filter by
    dividing, one at a time.
    """
    var, mean = torch.var_mean(rows, tuple(range(1, rows.ndim)), correction=0, keepdim=True)
    scale = (var + eps).rsqrt()
    if gain is not None:
        scale = scale * gain.view(mean.shape)
    result = (rows - mean) * scale
    return result if offset is None else result + offset.view(mean.shape)


@dataclass(frozen=True)
class Remembered:
    """What `standardize` made of rows, for graphs of other passes over the same rows.

    Attributes:
        result: (out_channels, fan_in).
        mean: (out_channels,) mean of every row.
        rstd: (out_channels,) reciprocal deviation of every row, eps included.
        gain: As given to `standardize`, of the type of the result.
        offset: As the gain.
        eps: As given to `standardize`.
    """

    result: Tensor
    mean: Tensor
    rstd: Tensor
    gain: Tensor | None
    offset: Tensor | None
    eps: float

    @classmethod
    def of(cls, rows: Tensor, eps: float = EPS, *, gain: Tensor | None = None, offset: Tensor | None = None) -> Self:
        """Standardize `rows` and remember what a backward pass needs."""
        rows = _at_least_float32(rows)
        gain, offset = (None if value is None else value.to(rows.dtype) for value in (gain, offset))
        count, length = rows.shape
        result, mean, rstd = torch.native_group_norm(rows[None], gain, offset, 1, count, length, count, eps)
        return cls(result.squeeze(0), mean[0], rstd[0], gain, offset, eps)

    def standardized(self, rows: Tensor) -> Tensor:
        """Return the result as it follows from `rows`, which hold the same values as those that it was made from."""
        made: Tensor = _Again.apply(_at_least_float32(rows), self)
        return made


class _Again(torch.autograd.Function):
    """Standardization whose forward pass is known already."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, known: Remembered) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.known = known
        return known.result.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rows,), known = ctx.saved_tensors, ctx.known
        if torch.is_grad_enabled():  # the gradient is to have one, too
            made = standardize(rows, known.eps, gain=known.gain, offset=known.offset)
            return torch.autograd.grad(made, rows, grad, create_graph=True)[0], None
        statistics, (count, length) = (known.mean[None], known.rstd[None]), rows.shape
        found, *_ = torch.ops.aten.native_group_norm_backward(
            grad[None].contiguous(), rows[None], *statistics, known.gain, 1, count, length, count, [True, False, False]
        )
        return found.squeeze(0), None


def gain_and_offset(rows: Tensor, eps: float = EPS) -> tuple[Tensor, Tensor]:
    """Return the (out_channels,) gain and offset with which ``gain·standardize(rows) + offset`` equals `rows`.

    The gain carries `eps` as the standardization does, so small and constant filters come back exactly too
    (``ConvAWS`` of DetectoRS, Qiao et al. 2020, arXiv 2006.02334, section 4.3, without its learned part).
    """
    rows = _at_least_float32(rows)
    if rows.is_meta:
        return rows.new_empty(len(rows)), rows.new_empty(len(rows))
    found = list[tuple[Tensor, Tensor]]()
    for part in rows.split(max(BLOCK // max(rows.shape[1], 1), 1)):  # what is beside the statistics stays in the cache
        count, length = part.shape
        _, mean, rstd = torch.native_group_norm(part, None, None, 1, count, length, count, eps)
        found.append((rstd[0], mean[0]))
    rstd, mean = found[0] if len(found) == 1 else (torch.cat(values) for values in zip(*found, strict=True))
    return rstd.reciprocal(), mean


def only_scaled(before: Tensor, after: Tensor) -> bool:
    """Tell whether filters, (out_channels, fan_in), are others each times a number, and not all times nearly one."""
    if before.is_meta or after.is_meta or not before.numel() or not before.is_floating_point():
        return False
    eps = max(torch.finfo(before.dtype).eps, torch.finfo(after.dtype).eps)
    before, after = before.double(), after.to(before.device).double()
    scale = ((before * after).sum(1) / before.square().sum(1)).nan_to_num()[:, None]
    largest = float(after.abs().amax())
    if float((after - scale * before).abs().amax()) > ROUNDING * eps * largest:
        return False
    return float(((scale - 1) * before).abs().amax()) > NEARLY * largest


def _order(weight: Tensor) -> list[int] | None:
    """Return the axes as they lie in memory where that is channels last, else None."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(weight.ndim)
    if last is None or weight.is_contiguous() or not weight.is_contiguous(memory_format=last):
        return None
    return [0, *range(2, weight.ndim), 1]


def _swap_channels(weight: Tensor, groups: int) -> Tensor:
    """Exchange the two channel axes within each group: (g·a, b, *k) becomes (g·b, a, *k). It undoes itself."""
    split = weight.view(groups, weight.shape[0] // groups, *weight.shape[1:])
    return split.transpose(1, 2).flatten(0, 1)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
