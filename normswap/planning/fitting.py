"""Fit a new norm to the statistics of the one it replaces: group count, epsilon, and how far it will drift."""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from normswap.layers.matching import damping, drift
from normswap.networks.network import Network
from normswap.networks.recognition import norm_parts
from normswap.planning.choices import Affine
from normswap.planning.entry import ConvEntry, NormEntry
from normswap.planning.groups import AUTO, group_counts, least
from normswap.planning.options import Options
from normswap.planning.statistics import is_silent, loud, statistics_before, usable

Statistics = tuple[Tensor, Tensor]


def fit_norms(
    norms: Mapping[str, NormEntry],
    options: Options,
    network: Network,
    convs: Mapping[str, ConvEntry],
    trained: Collection[str],
) -> dict[str, NormEntry]:
    """Match trained norms' running statistics; fresh ones' say nothing, so their affine part is copied.

    Args:
        norms: The norms' entries so far, by name.
        options: What the user asked for.
        network: The unconverted network.
        convs: The convolutions' entries by name.
        trained: Names of the norms whose statistics or affine part have left their initial values.
    """
    fitted, alike = dict(norms), dict[Any, dict[str, Statistics]]()
    for name, entry in norms.items():
        if not entry.converts:
            continue
        statistics = statistics_before(entry, network, convs) if name in trained else None
        if statistics is None or options.affine is Affine.COPY:
            told = f"; no statistics tell a group count: as for {AUTO}" if entry.groups_asked == "auto" else ""
            fitted[name] = replace(entry, affine=Affine.COPY, reason=entry.reason + told)
            continue
        silent = "; its γ is zero and counts as one" if is_silent(norm_parts(network.slots[name]).weight) else ""
        fitted[name] = replace(entry, affine=Affine.MATCH, reason=entry.reason + silent)
        if entry.groups is not None and usable(*statistics):
            own = entry.channels, entry.groups_asked, group_candidates(entry)
            key = *own, entry.per_position, statistics[0].device
            alike.setdefault(key, {})[name] = statistics
    for (_, asked, candidates, alone, _), statistics_by_name in alike.items():
        shrink = options.shrink_for(asked, equalized=False)
        for name, by_groups in _expected(statistics_by_name, network, candidates, shrink, alone).items():
            drifts = {groups: drift for groups, (_, drift) in by_groups.items()}
            best = least(drifts)
            fitted[name] = replace(fitted[name], groups=best, drift=rounded(drifts[best]), eps=by_groups[best][0])
    return fitted


def rounded(drift: float) -> float:
    """Return a drift with as many digits as mean anything."""
    return float(f"{drift:.4g}")


def group_candidates(entry: NormEntry) -> tuple[int, ...]:
    """Return the group counts that a norm may get: the one asked for, or all that leave its groups large enough."""
    if entry.groups_asked != "auto":
        return (entry.groups or 1,)
    positions = math.prod(entry.shape[2:]) if entry.shape else None
    return tuple(group_counts(entry.channels, positions=1 if entry.per_position else positions))


def _expected(
    statistics: Mapping[str, Statistics],
    network: Network,
    candidates: Iterable[int],
    shrink: float,
    per_position: bool,
) -> dict[str, dict[int, tuple[float, float]]]:
    """Return epsilon and drift by group count for norms of one size; together, as each alone is mostly overhead."""
    parts = [norm_parts(network.slots[name]) for name in statistics]
    mean, var = (torch.stack(values) for values in zip(*statistics.values(), strict=True))
    weight = torch.stack([loud(own.affine(m)[0]) for own, m in zip(parts, mean, strict=True)])
    eps = mean.new_tensor([own.eps for own in parts])
    found: dict[str, dict[int, tuple[float, float]]] = {name: {} for name in statistics}
    for groups in candidates:
        how: dict[str, Any] = {"num_groups": groups, "per_position": per_position}
        norm_eps = eps + damping(mean, var, shrink=shrink, **how)
        drifts = drift(weight, mean, var, eps=eps, norm_eps=norm_eps, **how)
        for name, *values in zip(statistics, norm_eps.tolist(), drifts.tolist(), strict=True):
            found[name][groups] = values[0], values[1]
    return found
