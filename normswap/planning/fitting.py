"""Fit a new norm to the statistics of the one it replaces: group count, epsilon, and how far it will drift."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from normswap.layers.matching import damping, drift
from normswap.networks.recognition import norm_parts
from normswap.planning.groups import group_counts
from normswap.planning.options import Options
from normswap.planning.plan import Entry
from normswap.planning.statistics import statistics_before, usable

Statistics = tuple[Tensor, Tensor]
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


def fit_norms(
    norms: Mapping[str, Entry],
    options: Options,
    modules: Mapping[str, nn.Module],
    convs: Mapping[str, Entry],
    measured: Measured,
) -> dict[str, Entry]:
    """Match trained norms' running statistics; fresh ones' say nothing, so their affine part is copied.

    Args:
        norms: The norms' entries so far, by name.
        options: What the user asked for.
        modules: The unconverted layers by name.
        convs: The convolutions' entries by name.
        measured: Drift seen on images, which goes before the one estimated from the statistics.
    """
    fitted, alike = dict(norms), dict[Any, dict[str, Statistics]]()
    for name, entry in norms.items():
        if not entry.changes:
            continue
        statistics = statistics_before(entry, modules, convs) if is_trained(modules[name]) else None
        matches = statistics is not None and options.affine == "match"
        fitted[name] = replace(entry, affine="match" if matches else "copy")
        if matches and entry.groups is not None and usable(*statistics):  # type: ignore[misc]
            key = entry.channels, entry.groups_asked, _candidates(entry), statistics[0].device  # type: ignore[index]
            alike.setdefault(key, {})[name] = statistics  # type: ignore[assignment]
    for (_, asked, candidates, _), statistics_by_name in alike.items():
        shrink = options.shrink_for(asked)
        for name, by_groups in _expected(statistics_by_name, modules, candidates, shrink).items():
            drifts = {groups: measured.get(name, {}).get(groups, drift) for groups, (_, drift) in by_groups.items()}
            best = min(drifts, key=drifts.__getitem__)
            fitted[name] = replace(
                fitted[name], groups=best, drift=float(f"{drifts[best]:.4g}"), eps=by_groups[best][0]
            )
    return fitted


def _candidates(entry: Entry) -> tuple[int, ...]:
    if entry.groups_asked != "auto":
        return (entry.groups or 1,)
    return tuple(group_counts(entry.channels, positions=math.prod(entry.shape[2:]) if entry.shape else None))


def _expected(
    statistics: Mapping[str, Statistics], modules: Mapping[str, nn.Module], candidates: Iterable[int], shrink: float
) -> dict[str, dict[int, tuple[float, float]]]:
    """Return epsilon and drift by group count for norms of one size; together, as each alone is mostly overhead."""
    parts = [norm_parts(modules[name]) for name in statistics]
    mean, var = (torch.stack(values) for values in zip(*statistics.values(), strict=True))
    weight = torch.stack(
        [torch.ones_like(m) if p.weight is None else p.weight.detach().to(m) for p, m in zip(parts, mean, strict=True)]
    )
    eps = torch.tensor([p.eps for p in parts], dtype=mean.dtype, device=mean.device)
    found: dict[str, dict[int, tuple[float, float]]] = {name: {} for name in statistics}
    for groups in candidates:
        norm_eps = eps + damping(mean, var, shrink=shrink, num_groups=groups)
        drifts = drift(weight, mean, var, eps=eps, norm_eps=norm_eps, num_groups=groups)
        for name, *values in zip(statistics, norm_eps.tolist(), drifts.tolist(), strict=True):
            found[name][groups] = values[0], values[1]
    return found
