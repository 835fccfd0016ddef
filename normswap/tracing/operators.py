"""What each ATen operator does to the values it reads."""

import math
from typing import Any

from torch import Tensor

from normswap.tracing.graph import AVERAGES, MOVES, Kind

VIEWS = MOVES | frozenset(
    """expand slice select split split_with_sizes unsafe_split unsafe_split_with_sizes chunk unsafe_chunk unbind
    as_strided roll flip rot90 index_select gather index take pixel_shuffle pixel_unshuffle unfold im2col col2im
    native_dropout dropout pad reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d
    replication_pad2d replication_pad3d repeat copy copy_ lift lift_fresh narrow channel_shuffle
    native_channel_shuffle tile diagonal repeat_interleave conj resolve_conj view_as_real view_as_complex fill
    real expand_copy slice_copy""".split()
)
POOLS = AVERAGES | frozenset(
    """max_pool1d max_pool2d_with_indices max_pool3d_with_indices max_pool2d max_pool3d adaptive_max_pool1d
    adaptive_max_pool2d adaptive_max_pool3d max_unpool2d grid_sampler_2d grid_sampler_3d""".split()
)
SHAPE_READERS = frozenset(
    """zeros_like ones_like empty_like full_like rand_like randn_like randint_like new_zeros new_ones new_empty new_full
    new_empty_strided isnan isinf""".split()
)
"""Operators that look at a tensor's shape, or for values that no sound pass has: what they return is a constant."""

ADDS = frozenset("add sub rsub lerp".split())
SCALES = frozenset("mul div neg addcmul".split())
CATS = frozenset("cat stack slice_scatter select_scatter index_put index_copy scatter masked_scatter".split())
CONVS = frozenset(
    """convolution convolution_overrideable torchvision::deform_conv2d mkldnn_convolution cudnn_convolution
    cudnn_convolution_transpose slow_conv3d conv_depthwise3d conv_depthwise2d""".split()
)
LINEARS = frozenset("mm addmm bmm baddbmm linear mv addmv matmul dot".split())
OTHER_NORMS = frozenset(
    "native_group_norm group_norm native_layer_norm layer_norm fused_rms_norm rms_norm instance_norm batch_norm".split()
)

STEERING: dict[str, slice] = {
    **dict.fromkeys(["gather", "index", "take", "index_select", "grid_sampler_2d", "grid_sampler_3d"], slice(1, None)),
    **dict.fromkeys(["max_unpool2d", "div", "repeat_interleave"], slice(1, None)),
    **dict.fromkeys(["scatter", "index_copy", "masked_scatter"], slice(1, 2)),
    **dict.fromkeys(OTHER_NORMS, slice(1, None)),
    "index_put": slice(1, -1),
    "lerp": slice(2, None),
}
"""Operands, by position among the tensors, that say where values come from or by what they are weighed."""


def steers(name: str, func: Any, operands: list[Tensor]) -> list[Tensor]:
    """Return the operands whose scale does more than scale the result: indices, masks, grids, divisors."""
    places = slice(0, None) if "repeat_interleave.Tensor" in str(func) else STEERING.get(name, slice(0, 0))
    chosen = {id(operand) for operand in operands[places]}
    return [o for o in operands if id(o) in chosen or not (o.is_floating_point() or o.is_complex())]


def base_name(func: Any) -> str:
    """Return the operator's name without overload and the underscores of private and in-place forms.

    Operators that are not torch's own keep their namespace: they may be of the same name, and do something else.
    """
    space, _, name = str(func._schema.name).rpartition("::")
    return name.strip("_") if space == "aten" else f"{space}::{name.strip('_')}"


def spelled(name: str, func: Any, args: tuple[Any, ...]) -> str:
    """Return an operator's base name, and another one where its arguments have it do something else to the values.

    A division may round, and what is padded or filled with a number does not scale with the values beside it; the
    infinities that a maximum ignores do.
    """
    if name == "div" and func._overloadname.endswith("_mode"):
        return "rounding division"
    if name in ("constant_pad_nd", "fill") and len(args) > 1:
        if isinstance(args[-1], Tensor):
            return f"{name} with a tensor"
        value = args[-1] if isinstance(args[-1], (bool, int, float, complex)) else 0
        return f"{name} with {value:g}" if value and not math.isinf(abs(value)) else name
    return name


def varies(constant: Tensor, shape: tuple[int, ...], *, channels_first: bool) -> bool:
    """Tell whether a constant that is added to values differs within a channel: a norm then sees their ratio.

    Args:
        constant: What is added.
        shape: Shape of the sum.
        channels_first: Whether the channels are known to be axis 1; else the last axis may be theirs.
    """
    first = len(shape) - constant.ndim
    axes = {first + axis for axis, size in enumerate(constant.shape) if size > 1}
    return not (axes <= {1} or (axes <= {len(shape) - 1} and not channels_first))


def kind_of(name: str, data: int, parameters: int) -> Kind:
    """Return what an operator does, by its base name and how many of its operands are data and parameters.

    A tensor that is two of its operands counts twice: a product with itself is no scale.
    """
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
