"""What each ATen operator does to the values it reads, and answers for those that need data to know their shape."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from normswap.tracing.graph import Kind

VIEWS = frozenset(
    """view reshape unsafe_view reshape_alias permute transpose t expand slice select split split_with_sizes
        unsafe_split unsafe_split_with_sizes chunk unsafe_chunk unbind unsqueeze squeeze clone contiguous to_copy
    detach alias as_strided
    flatten unflatten roll flip rot90 index_select gather index take pixel_shuffle pixel_unshuffle unfold im2col col2im
    native_dropout dropout constant_pad_nd pad reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d
    replication_pad2d replication_pad3d repeat copy copy_ lift lift_fresh movedim narrow channel_shuffle
    native_channel_shuffle view_as swapaxes tile diagonal repeat_interleave conj resolve_conj view_as_real
    view_as_complex fill real view_copy expand_copy permute_copy slice_copy""".split()
)
POOLS = frozenset(
    """avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d_with_indices max_pool3d_with_indices max_pool2d max_pool3d
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
    adaptive_max_pool3d mean upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_nearest_exact1d
    upsample_nearest_exact2d upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d upsample_bilinear2d_aa
    upsample_bicubic2d upsample_bicubic2d_aa upsample_trilinear3d max_unpool2d grid_sampler_2d
    grid_sampler_3d""".split()
)
ADDS = frozenset("add sub rsub lerp".split())
SCALES = frozenset("mul div neg addcmul".split())
CATS = frozenset("cat stack slice_scatter select_scatter index_put index_copy scatter masked_scatter".split())
CONVS = frozenset(
    """convolution convolution_overrideable deform_conv2d mkldnn_convolution cudnn_convolution
    cudnn_convolution_transpose slow_conv3d conv_depthwise3d conv_depthwise2d""".split()
)
LINEARS = frozenset("mm addmm bmm baddbmm linear mv addmv matmul dot".split())
OTHER_NORMS = frozenset(
    "native_group_norm group_norm native_layer_norm layer_norm fused_rms_norm rms_norm instance_norm batch_norm".split()
)

ELEMENTWISE = frozenset(
    """add sub mul div relu relu6 hardtanh clamp clamp_min sigmoid hardsigmoid tanh silu hardswish gelu elu leaky_relu
    mish softplus log_sigmoid exp""".split()
)


def base_name(func: Any) -> str:
    """Return the operator's name without namespace, overload and the underscores of private and in-place forms."""
    return str(func._schema.name).rpartition("::")[2].strip("_")


def kind_of(name: str, data: int, parameters: int) -> Kind:
    """Return what an operator does, by its base name and how many of its operands are data and parameters."""
    if name in VIEWS:
        return Kind.VIEW if data == 1 else Kind.CAT
    if name in POOLS:
        return Kind.POOL
    if name in CATS:
        return Kind.CAT
    if name in ADDS:
        return Kind.ADD if data > 1 else Kind.SCALE
    if name in SCALES:
        return Kind.SCALE if data == 1 else Kind.OTHER
    if name in CONVS:
        return Kind.CONV
    if name in LINEARS:
        return Kind.LINEAR if parameters and data == 1 else Kind.OTHER
    return Kind.OTHER_NORM if name in OTHER_NORMS else Kind.OTHER


def shape_alone(func: Any, name: str, args: tuple[Any, ...], operands: list[Tensor]) -> Any:
    """Return an empty result on the meta device for operators whose result's shape is plain, else NotImplemented.

    torch works these out in Python there, which takes most of the time of a pass without data.
    """
    first, schema = operands[0], func._schema
    if name in OTHER_NORMS:
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
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int], dilation: list[int],
    transposed: bool, output_padding: list[int], groups: int,
) -> tuple[int, ...] | None:  # fmt: skip
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


def _scalar(tensor: Tensor) -> Any:
    if tensor.dtype is torch.bool:
        return True
    return 1.0 if tensor.dtype.is_floating_point else 1


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
    "local_scalar_dense": _scalar,
    "equal": lambda *_: True,
    "is_nonzero": lambda *_: True,
    "nonzero": lambda tensor: _rows(tensor, ROWS, tensor.ndim, dtype=torch.long),
    "masked_select": lambda tensor, _: _rows(tensor, ROWS),
    "index": _index,
    "nms": lambda boxes, *_: _rows(boxes, min(ROWS, boxes.shape[0]), dtype=torch.long),
    "unique2": _unique,
    "unique_dim": _unique,
    "unique_consecutive": _unique,
    "repeat_interleave": lambda repeats, **_: _rows(repeats, ROWS * repeats.shape[0]),
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
