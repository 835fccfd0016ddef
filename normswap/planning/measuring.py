"""Measure on images what other group counts would do to a network's norms."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normswap.errors import InvalidOption
from normswap.layers.matching import closed_form, damping
from normswap.networks.copying import copy_model
from normswap.networks.hooks import channel_moments, watching
from normswap.networks.inputs import call
from normswap.networks.network import Network
from normswap.networks.recognition import norm_parts
from normswap.planning.choices import Affine
from normswap.planning.groups import group_counts
from normswap.planning.plan import Plan


def measured_drift(network: Network, plan: Plan, batches: Iterable[Any]) -> dict[str, dict[int, float]]:
    """Return the drift that images show, by norm and group count, for the norms whose group count is to be chosen.

    Args:
        network: The unconverted network; a copy in eval mode sees the images.
        plan: A plan of it, made without images.
        batches: Example inputs; each is seen once.

    Raises:
        InvalidOption: There is no such norm.
    """
    chosen = {
        entry.name: group_counts(entry.channels, positions=math.prod(entry.shape[2:]))
        for entry in plan.norms
        if entry.groups_asked == "auto" and entry.affine is Affine.MATCH and entry.shape is not None
    }
    if not chosen:
        raise InvalidOption("batches= are for groups='auto' and trained norms; there are none here, leave it out")
    shrink = plan.options.shrink_for("auto")
    return measure_drift(Network(copy_model(network.model).eval()), chosen, batches, shrink=shrink)


@torch.no_grad()
def measure_drift(
    original: Network, counts: Mapping[str, Iterable[int]], batches: Iterable[Any], *, shrink: float
) -> dict[str, dict[int, float]]:
    """Return how far GroupNorm's output would be from BatchNorm's, by norm and group count.

    Each norm is looked at by itself, on what the original feeds it: the root mean square difference over the output's
    standard deviation, as `normswap.layers.matching.drift` estimates it without images.

    Args:
        original: The unconverted network, in eval mode.
        counts: Group counts to try, by norm.
        batches: Example inputs; each is seen once.
        shrink: As for `normswap.convert`.
    """
    moved: dict[str, dict[int, float]] = {name: dict.fromkeys(tried, 0.0) for name, tried in counts.items()}
    varied = dict.fromkeys(counts, 0.0)

    def compare(name: str, norm: nn.Module, x: Tensor) -> None:
        parts, x = norm_parts(norm), x.float()
        if parts.mean is None or parts.var is None:
            return
        mean, var = parts.mean.float(), parts.var.float()
        weight, _ = parts.affine(mean)
        axes = (1, -1, *(1 for _ in x.shape[2:]))
        scale = weight / (var + parts.eps).sqrt()
        exact = (x - mean.view(axes)) * scale.view(axes)
        varied[name] += float((scale.square() * channel_moments(x)[1]).sum())
        for groups in moved[name]:
            eps = parts.eps + float(damping(mean, var, shrink=shrink, num_groups=groups))
            affine = closed_form(weight, 0 * weight, mean, var, eps=parts.eps, norm_eps=eps, num_groups=groups)
            off = F.group_norm(x, groups, *affine, eps) - exact
            moved[name][groups] += float(off.square().sum()) / (off.numel() / len(mean))

    with watching({name: original.slots[name] for name in counts}, compare):
        for batch in batches:
            call(original.model, batch)
    return {
        name: {groups: (value / varied[name]) ** 0.5 for groups, value in tried.items()}
        for name, tried in moved.items()
        if varied[name]
    }
