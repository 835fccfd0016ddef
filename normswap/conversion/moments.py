"""Match moments: give every GroupNorm the mean and deviation per channel that its BatchNorm had on the same images."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normswap.layers.matching import CONSTANT, scale_and_shift
from normswap.networks.hooks import channel_moments, watching
from normswap.networks.inputs import call, fresh
from normswap.networks.network import Network
from normswap.networks.recognition import norm_parts


class Moments:
    """Running mean and variance per channel of everything passed to `add`; memory does not grow."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: Tensor = torch.zeros(())
        self.squares: Tensor = torch.zeros(())

    def add(self, mean: Tensor, var: Tensor) -> None:
        """Count one batch by its (C,) mean and variance."""
        self.count += 1
        self.sums = self.sums.to(mean.device) + mean
        self.squares = self.squares.to(mean.device) + var + mean.square()

    @property
    def mean(self) -> Tensor:
        """Mean per channel, (C,)."""
        return self.sums / self.count

    @property
    def var(self) -> Tensor:
        """Variance per channel, (C,)."""
        return (self.squares / self.count - self.mean.square()).clamp_min(0)


@torch.no_grad()
def match_moments(converted: Network, original: Network, names: Iterable[str], batches: Iterable[Any]) -> None:
    """Give every GroupNorm the per-channel mean and standard deviation that its BatchNorm has on the same images.

    On each batch a norm is set right before it runs, so that the later ones see what corrected ones before them make;
    the moments of all batches together give the values that stay. Both networks must be in eval mode.

    Args:
        converted: The network whose norms' affine values are set.
        original: The network it was converted from.
        names: The norms, by the name they have in both.
        batches: Example inputs; each is seen once.
    """
    ours, theirs = ({name: network.slots[name] for name in names} for network in (converted, original))
    wanted: dict[str, list[tuple[Tensor, Tensor]]] = {}
    before, after = {name: Moments() for name in ours}, {name: Moments() for name in ours}

    def remember(name: str, norm: nn.Module, x: Tensor) -> None:
        wanted[name].append(_batch_norm_moments(norm, *channel_moments(x)))

    def correct(name: str, norm: nn.Module, x: Tensor) -> None:
        if not wanted[name]:
            return
        normalized = channel_moments(F.group_norm(x, norm.num_groups, eps=norm.eps))  # type: ignore[arg-type]
        target = wanted[name].pop(0)
        before[name].add(*normalized)
        after[name].add(*target)
        _set_affine(norm, *normalized, *target)

    with watching(theirs, remember), watching(ours, correct), torch.compiler.set_stance("force_eager"):
        for batch in batches:
            wanted.update({name: [] for name in ours})
            call(original.model, fresh(batch))
            call(converted.model, fresh(batch))
    for name, norm in ours.items():
        if before[name].count:
            seen, target = before[name], after[name]
            _set_affine(norm, seen.mean, seen.var, target.mean, target.var)


def _batch_norm_moments(norm: nn.Module, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Return the moments of a norm's output, before any activation, from those of its input.

    A norm that keeps no running statistics normalizes with the batch's own, in eval mode too.
    """
    parts = norm_parts(norm)
    weight, bias = parts.affine(mean)
    running = (mean, var) if parts.mean is None or parts.var is None else (parts.mean, parts.var)
    scale, shift = scale_and_shift(weight, bias, *running, eps=parts.eps)
    return scale * mean + shift, scale.square() * var


def _set_affine(norm: nn.Module, mean: Tensor, var: Tensor, wanted_mean: Tensor, wanted_var: Tensor) -> None:
    """Set weight and bias so that values of the given moments come out with the wanted ones; signs stay."""
    weight: Any = norm.weight
    alive = var > CONSTANT
    scale = torch.where(alive, (wanted_var / var.clamp_min(1e-300)).sqrt(), weight.double().abs())
    scale = torch.where(weight.double() < 0, -scale, scale)
    weight.copy_(scale)
    norm.bias.copy_(wanted_mean - scale * mean)  # type: ignore[operator]
