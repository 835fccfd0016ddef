"""Weight standardization as tensor maths: tensors in, tensors out (Qiao et al. 2019, arXiv 1903.10520, equation 2)."""

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6
"""Added to the variance inside the root, as timm's ``StdConv2d`` does: a constant filter has a finite gradient."""

FORMULA = "(w - mean) / sqrt(var_biased + eps)"
"""The formula, as recorded in checkpoints."""


def filters(weight: Tensor, *, transposed: bool = False, groups: int = 1) -> Tensor:
    """Return the weight as (out_channels, fan_in), one row a filter.

    A convolution's weight is (out, in/groups, *kernel), a transposed one's (in, out/groups, *kernel).
    """
    if transposed:
        weight = _swap_channels(weight, groups)
    return weight.flatten(1)


def kernel(rows: Tensor, shape: torch.Size, *, transposed: bool = False, groups: int = 1) -> Tensor:
    """Undo `filters`: rows (out_channels, fan_in) become a weight of `shape`."""
    if not transposed:
        return rows.view(shape)
    return _swap_channels(rows.view(shape[1] * groups, shape[0] // groups, *shape[2:]), groups)


def standardize(rows: Tensor, eps: float = EPS) -> Tensor:
    """Give every row zero mean and unit variance, (out_channels, fan_in) to the same shape.

    Statistics are float32 for half-precision rows; the biased variance is used and `eps` is inside the root.
    """
    return F.layer_norm(_at_least_float32(rows), rows.shape[1:], eps=eps)


def gain_and_offset(rows: Tensor, eps: float = EPS) -> tuple[Tensor, Tensor]:
    """Return the (out_channels,) gain and offset with which ``gain·standardize(rows) + offset`` equals `rows`.

    The gain carries `eps` as the standardization does, so small and constant filters come back exactly too
    (``ConvAWS`` of DetectoRS, Qiao et al. 2020, arXiv 2006.02334, section 4.3, without its learned part).
    """
    var, mean = torch.var_mean(_at_least_float32(rows), dim=1, correction=0)
    return (var + eps).sqrt(), mean


def common_scale(rows: Tensor) -> Tensor:
    """Return the root mean square of the filters' standard deviations, a scalar."""
    return rows.double().var(dim=1, correction=0).mean().sqrt()


def _swap_channels(weight: Tensor, groups: int) -> Tensor:
    """Exchange the two channel axes within each group: (g·a, b, *k) becomes (g·b, a, *k). It undoes itself."""
    split = weight.view(groups, weight.shape[0] // groups, *weight.shape[1:])
    return split.transpose(1, 2).flatten(0, 1)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
