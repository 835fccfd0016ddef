"""Find the tensors with which a convolution of whatever class convolves with a given kernel."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from normswap.conversion.execution import kernel_in_use, own_tensors
from normswap.layers.convs import layout_of
from normswap.layers.standardization import filters, kernel

EXACT = 1e-5
"""Largest difference of two kernels, relative to the largest weight, that is rounding."""


@dataclass(frozen=True)
class Fill:
    """What a convolution holds to convolve with a kernel.

    Attributes:
        values: Its tensors by name.
        scale: The kernel that was asked for, over that which it convolves with: one number for all filters.
        how: In words.
    """

    values: dict[str, Tensor]
    scale: float
    how: str


@torch.no_grad()
def filled(module: nn.Module, shape: tuple[int, ...], wanted: Tensor, raw: Tensor) -> Fill | None:
    """Return what a convolution needs to convolve with a kernel; None where it has no way to.

    What it makes of its weight is seen by running it. Where that is not the weight itself, it standardizes in some way:
    then it gets the filters that are standardized, and tensors of one value per filter, where it has them, take up
    scale and mean by least squares.

    Args:
        module: A copy of the convolution in eval mode, which is changed.
        shape: An input that it met.
        wanted: The kernel.
        raw: The filters that the kernel is made of by standardization; the kernel itself where it is made of nothing.
    """
    made = _kernel(module, shape, wanted)
    if made is None:
        return None
    if _same(made, wanted):
        return Fill({"weight": wanted}, 1.0, "kernel as it is" if raw is wanted else "folded")
    for weight in (raw, _unit(raw, module)):
        if (found := _standardized(module, shape, wanted, weight)) is not None:
            return found
    return None


def _standardized(module: nn.Module, shape: tuple[int, ...], wanted: Tensor, weight: Tensor) -> Fill | None:
    constants = [
        key for key, own in own_tensors(module).items() if key not in ("weight", "bias") and _is_per_filter(own, module)
    ]
    if not constants:
        made = _kernel(module, shape, weight)
        if made is None or float(made.square().sum()) == 0:
            return None
        scale = float((made * wanted).sum() / made.square().sum())
        fits = scale > 0 and _same(made * scale, wanted)
        return Fill({"weight": weight}, scale, "filters as they are, standardized there") if fits else None
    own = own_tensors(module)
    parts = []
    for key in constants:
        for other in constants:
            own[other].fill_(float(other == key))
        parts.append(_kernel(module, shape, weight))
    rows = _rows(wanted, module)
    if any(part is None for part in parts):
        return None
    basis = torch.stack([_rows(part, module) for part in parts if part is not None], -1).double()
    factors = torch.linalg.lstsq(basis, rows.double().unsqueeze(-1)).solution.squeeze(-1)
    values = {"weight": weight}
    for key, factor in zip(constants, factors.unbind(1), strict=True):
        values[key] = factor.to(own[key]).view(own[key].shape)
        own[key].copy_(values[key])
    made = _kernel(module, shape, weight)
    fits = made is not None and _same(made, wanted)
    return Fill(values, 1.0, "filters as they are, with gain and offset") if fits else None


def _kernel(module: nn.Module, shape: tuple[int, ...], weight: Tensor) -> Tensor | None:
    own = own_tensors(module)["weight"]
    own.copy_(weight)
    found = kernel_in_use(module, shape)
    return None if found is None or found[0].shape != weight.shape else found[0]


def _is_per_filter(tensor: Tensor, module: nn.Module) -> bool:
    return tensor.is_floating_point() and tensor.numel() == int(module.out_channels)  # type: ignore[arg-type]


def _rows(weight: Tensor, module: nn.Module) -> Tensor:
    return filters(weight.contiguous(), **layout_of(module))


def _unit(weight: Tensor, module: nn.Module) -> Tensor:
    """Return filters of unit deviation, beside which any epsilon is nothing."""
    rows = _rows(weight, module)
    spread = rows.std(1, correction=0, keepdim=True)
    return kernel(rows / spread.clamp_min(1e-12), weight.contiguous(), **layout_of(module))


def _same(found: Tensor, wanted: Tensor) -> bool:
    largest = float(wanted.abs().amax()) if wanted.numel() else 0.0
    return torch.allclose(found, wanted, rtol=0, atol=EXACT * largest)
