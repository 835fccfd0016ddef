"""Fit a new norm to the statistics of the one it replaces: group count, epsilon, and how far it will drift."""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from normswap.families import norm_parts
from normswap.groups import group_counts
from normswap.matching import damping, drift
from normswap.plan import Entry, Options
from normswap.statistics import statistics_before, usable

Measured = Mapping[str, Mapping[int, float]]
"""Drift of each norm by group count, as seen on images."""


def is_trained(norm: nn.Module) -> bool:
    """Tell whether a norm's statistics or affine part have left their initial values (0 and 1)."""
    parts = norm_parts(norm)
    for value, fresh in ((parts.mean, 0), (parts.var, 1), (parts.bias, 0)):
        if value is not None and not value.is_meta and bool((value != fresh).any()):
            return True
    weight = parts.weight  # some networks start with a weight of zero throughout
    return weight is not None and not weight.is_meta and bool((weight != weight[0]).any())


def fit_norm(
    entry: Entry, options: Options, modules: Mapping[str, nn.Module], convs: Mapping[str, Entry], measured: Measured
) -> Entry:
    """Match a trained norm's running statistics; a fresh one's say nothing, so its affine part is copied.

    Args:
        entry: The norm's entry so far.
        options: What the user asked for.
        modules: The unconverted layers by name.
        convs: The convolutions' entries by name.
        measured: Drift seen on images, which goes before the one estimated from the statistics.
    """
    if not entry.changes:
        return entry
    norm = modules[entry.name]
    statistics = statistics_before(entry, modules, convs) if is_trained(norm) else None
    if statistics is None or options.affine == "copy":
        return replace(entry, affine="copy")
    entry = replace(entry, affine="match")
    if entry.groups is None or not usable(*statistics):
        return entry
    parts, candidates = norm_parts(norm), [entry.groups]
    if entry.groups_asked == "auto":
        candidates = group_counts(entry.channels, positions=math.prod(entry.shape[2:]) if entry.shape else None)
    weight = torch.ones(entry.channels) if parts.weight is None else parts.weight.detach()
    drifts: dict[int, tuple[float, float]] = {}
    for groups in candidates:
        eps = parts.eps + damping(*statistics, shrink=options.shrink_for(entry.groups_asked), num_groups=groups)
        expected = drift(weight, *statistics, eps=parts.eps, norm_eps=eps, num_groups=groups)
        drifts[groups] = measured.get(entry.name, {}).get(groups, expected), eps
    best = min(drifts, key=lambda groups: drifts[groups][0])
    return replace(entry, groups=best, drift=float(f"{drifts[best][0]:.4g}"), eps=drifts[best][1])
