"""Align norms: give every GroupNorm the affine values that bring it closest to its BatchNorm on the same images."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from normswap.layers.matching import scale_and_shift
from normswap.layers.norms import normalized, takes_steps
from normswap.networks.hooks import watching
from normswap.networks.inputs import call, fresh
from normswap.networks.network import Network
from normswap.networks.processes import summed
from normswap.networks.recognition import norm_parts
from normswap.planning.choices import Action
from normswap.planning.plan import Plan

PASSES = 3
"""Times that several batches are gone through: the first ones were met by norms that had not seen the others yet."""

ROUNDING = 1e-12
"""Variance of a normalized channel below which it is float32's rounding."""

FLOOR = 0.2
"""Least share of the scale that would give a channel its deviation; regression on noise would turn the channel off."""


def alignable(plan: Plan) -> list[str]:
    """Return the names of the norms that images can align: those that became GroupNorm and that a forward pass met."""
    return [entry.name for entry in plan.norms if entry.action is Action.GROUP_NORM and entry.shape is not None]


@torch.no_grad()
def match_moments(converted: Network, original: Network, names: Iterable[str], batches: Iterable[Any]) -> None:
    """Set weight and bias of every GroupNorm by least squares towards its BatchNorm's output on the same images.

    A norm is set right before it runs, so that the later ones see what corrected ones before them make, by all the
    batches seen so far; in further passes a batch's share is replaced by what it has become. Memory is that of one
    batch's activations. Where processes work together, each sees batches of its own and all set the same values. Both
    networks must be in eval mode.

    Args:
        converted: The network whose norms' affine values are set.
        original: The network it was converted from.
        names: The norms, by the name they have in both.
        batches: Example inputs; a list or a loader is gone through three times, an iterator once.
    """
    ours, theirs = ({name: network.slots[name] for name in names} for network in (converted, original))
    fed: dict[str, list[Tensor]] = defaultdict(list)
    shares: dict[str, dict[tuple[int, int], Tensor]] = {name: {} for name in ours}
    signs = {name: norm.weight.detach().double().sign() for name, norm in ours.items()}  # type: ignore[operator]
    calls, at = dict.fromkeys(ours, 0), 0

    def remember(name: str, _norm: nn.Module, x: Tensor) -> None:
        fed[name].append(x.clone())  # what runs after it may write into it

    def correct(name: str, norm: nn.Module, x: Tensor) -> None:
        if not fed[name]:
            return
        values = normalized(norm, _exact(x))  # type: ignore[arg-type]
        shares[name][at, calls[name]] = summed(joint_sums(values, _exact(fed[name].pop(0))))
        calls[name] += 1
        together = torch.stack([*shares[name].values()]).sum(0)
        _regress(norm, theirs[name], together, signs[name])

    passes = 1 if iter(batches) is batches else PASSES
    stepped = {name for name, norm in ours.items() if takes_steps(norm)}
    before, then = watching(theirs, remember, stepped=stepped), watching(ours, correct, stepped=stepped)
    with before, then, torch.compiler.set_stance("force_eager"):
        for _ in range(passes):
            for number, batch in enumerate(batches):
                at = number
                calls.update(dict.fromkeys(ours, 0))
                fed.clear()
                call(original.model, fresh(batch))
                call(converted.model, fresh(batch))
            if at == 0:  # one batch: a second look at it would see the same
                break


def _exact(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def joint_sums(ours: Tensor, theirs: Tensor) -> Tensor:
    """Return the (6, C) count and sums over (N, C, *) values of x, y, x², y² and x·y, in float64 to be added up."""
    axes = [0, *range(2, ours.ndim)]
    mean, their_mean = (values.mean(axes, keepdim=True) for values in (ours, theirs))
    ours, theirs = ours - mean, theirs - their_mean
    var, their_var, both = ((x * y).mean(axes).double() for x, y in ((ours, ours), (theirs, theirs), (ours, theirs)))
    mean, their_mean = mean.double().flatten(), their_mean.double().flatten()
    count = torch.full_like(mean, ours.numel() / ours.shape[1])
    squares = var + mean.square(), their_var + their_mean.square(), both + mean * their_mean
    return count * torch.stack([torch.ones_like(mean), mean, their_mean, *squares])


def _regress(norm: nn.Module, batch_norm: nn.Module, sums: Tensor, sign: Tensor) -> None:
    """Set a GroupNorm's weight and bias so that its output comes closest to BatchNorm's; signs stay.

    A BatchNorm that keeps no running statistics normalizes with the batch's own, in eval mode too.
    """
    mean, their_mean, square, their_square, product = sums[1:] / sums[0]
    var, their_var = (square - mean.square()).clamp_min(0), (their_square - their_mean.square()).clamp_min(0)
    parts = norm_parts(batch_norm)
    running = (their_mean, their_var) if parts.mean is None or parts.var is None else (parts.mean, parts.var)
    scale, shift = scale_and_shift(*parts.affine(their_mean), *running, eps=parts.eps)
    alive, old = var > ROUNDING, norm.weight.detach().double()  # type: ignore[operator]
    most = (scale.square() * their_var / var.clamp_min(1e-300)).sqrt()
    slope = sign * scale * (product - mean * their_mean) / var.clamp_min(1e-300)
    weight = torch.where(alive, sign * slope.clamp_min(FLOOR * most).minimum(most), old)
    norm.weight.copy_(weight)  # type: ignore[operator]
    norm.bias.copy_(scale * their_mean + shift - weight * mean)  # type: ignore[operator]
