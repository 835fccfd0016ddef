"""Which norms can be equalized, and with which scales: from what images show, or from running statistics alone."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from normswap.layers.convs import WeightStandardized
from normswap.layers.equalization import alternating, balanced, deviation, drift_of, equalize, rescaled
from normswap.layers.matching import damping
from normswap.layers.standardization import filters
from normswap.networks.network import Network
from normswap.networks.recognition import norm_parts, rows_of
from normswap.planning.choices import WS, Action, Affine
from normswap.planning.entry import ConvEntry, NormEntry
from normswap.planning.fitting import group_candidates, rounded
from normswap.planning.measuring import Images, moments_of
from normswap.planning.options import Options
from normswap.planning.statistics import usable
from normswap.tracing.facts import LayerFacts, Trace
from normswap.tracing.graph import Kind

Scales = dict[str, tuple[float, ...]]
"""A factor for every output channel, by layer."""

PROJECTIONS, FLIPS = 8, 48
"""Mixtures of filter sums that stand for their covariance, and the most signs that are flipped for them."""

LOSS, LESS = 0.1, 4
"""Sum of the squared drifts from which most answers are lost, and how many times less one group must leave to be named.
On ImageNet networks a sum of 0.004 kept 73 % of the answers, 0.2 kept 28 % and 0.7 kept 13 %."""

COARSE, FEW = 12, 8
"""Steps that compare group counts, of which the one that is chosen gets all, and the most groups that are compared."""


def equalize_norms(
    network: Network,
    trace: Trace,
    norms: Mapping[str, NormEntry],
    convs: Mapping[str, ConvEntry],
    options: Options,
    images: Images,
) -> tuple[dict[str, NormEntry], Scales, list[str]]:
    """Return the norms' entries with what equalization makes of them, the scales of the layers before them, and advice.

    Args:
        network: The unconverted network.
        trace: What a forward pass showed.
        norms: The norms' entries, fitted to their running statistics.
        convs: The convolutions' entries.
        options: What the user asked for.
        images: What images showed; empty for none.
    """
    standard = trace.first_feeder(lambda node: node.name in convs and convs[node.name].ws is WS.STANDARD)
    found, scales, alike = dict(norms), Scales(), dict[Any, list[str]]()
    for name, entry in norms.items():
        if entry.action is not Action.GROUP_NORM or entry.affine is not Affine.MATCH:
            continue
        obstacle = _obstacle(network, trace, entry, convs, options) if options.equalize else "not asked for"
        found[name] = replace(entry, not_equalized=obstacle)
        if standard(name) is not None:
            continue  # it will meet other statistics than the ones that images show now
        parts = norm_parts(network.slots[name])
        if parts.mean is not None and not parts.mean.is_meta and entry.drift is not None:
            seen = sum(map(len, images[name].first)) if name in images else 0
            size = entry.channels, entry.groups, entry.groups_asked, group_candidates(entry), not obstacle
            alike.setdefault((*size, seen, parts.mean.device), []).append(name)
    for (*_, free, seen, _), names in alike.items():
        entries = [found[name] for name in names]
        made = (
            _from_images(network, entries, options, images, free) if seen else _signs(network, entries, options, free)
        )
        for entry, scale in made:
            found[entry.name] = entry
            if scale is not None:
                scales[entry.fed_by[0]] = scale
    return found, scales, list(_advice(network, found, options, images))


def _advice(network: Network, norms: Mapping[str, NormEntry], options: Options, images: Images) -> Iterator[str]:
    """Say so where the group count that was asked for loses most of the function and one group would keep it."""
    asked = [norms[name] for name in images if norms[name].groups_asked not in ("auto", 1) and norms[name].drift]
    lost = sum(entry.drift**2 for entry in asked if entry.drift)
    if lost < LOSS:
        return
    fitted = 0.0
    for entry in asked:
        moments = moments_of([images[entry.name]], network, [entry.name])
        shrink = options.shrink_for(entry.groups_asked)
        if entry.not_equalized:
            drift = drift_of(moments, num_groups=1, shrink=shrink)
        else:
            drift = equalize(moments, num_groups=1, shrink=shrink, steps=COARSE)[1]
        fitted += float(drift.square())
    if fitted * LESS < lost:
        yield (
            "the groups asked for lose much of what the network knows: samples' own statistics move the norms' outputs "
            f"by {lost:.2g} in all (sum of squared drifts), with one group (--groups 1) by {fitted:.2g}"
        )


def _obstacle(
    network: Network, trace: Trace, entry: NormEntry, convs: Mapping[str, ConvEntry], options: Options
) -> str:
    """Return why the filters before a norm cannot be scaled, or nothing."""
    facts = trace.norms.get(entry.name)
    if facts is None:
        return "never runs"
    if len(facts.fed_by) != 1 or facts.fed_by[0].kind not in (Kind.CONV, Kind.LINEAR):
        return "not fed by one convolution or linear layer"
    if not facts.direct:
        return "something stands between the layer before it and the norm"
    name, kind = facts.fed_by[0].name, facts.fed_by[0].kind
    read = (trace.convs if kind is Kind.CONV else trace.linears).get(name)
    return _layer_obstacle(network, name, entry, read, convs.get(name), options)


def _layer_obstacle(
    network: Network,
    name: str,
    norm: NormEntry,
    facts: LayerFacts | None,
    entry: ConvEntry | None,
    options: Options,
) -> str:
    layer = network.slots.get(name)
    weight = None if layer is None else layer._parameters.get("weight")
    if layer is None or facts is None or weight is None or not facts.plain:
        return f"the kernel of {name} is computed in the forward pass"
    if facts.leaves or facts.weight_reads or len(facts.read_by) != 1:
        return f"{name} is read by others, too"
    if not weight.requires_grad or isinstance(layer, WeightStandardized):
        return f"the filters of {name} are fixed"
    if options.leaves(name):
        return f"{name} is left alone: {options.leaves(name)}"
    if entry is not None and entry.ws is WS.STANDARD:
        return f"the filters of {name} are standardized without their scale"
    if rows_of(layer) != norm.channels or (not isinstance(layer, nn.Linear) and entry is None):
        return f"{name} is no layer with one filter per channel"
    if any(network.owners[id(own)] > 1 for own in (weight, layer._parameters.get("bias")) if own is not None):
        return f"{name} shares its parameters with another layer"
    return ""


def _from_images(
    network: Network, entries: list[NormEntry], options: Options, images: Images, free: bool
) -> list[tuple[NormEntry, tuple[float, ...] | None]]:
    """Fit norms of one size on what images showed; those that are not free are only measured."""
    names = [entry.name for entry in entries]
    moments = moments_of([images[name] for name in names], network, names)
    shrink = options.shrink_for(entries[0].groups_asked)
    counts = [count for count in group_candidates(entries[0]) if count <= FEW] or list(group_candidates(entries[0]))

    def tried(groups: int, **more: Any) -> tuple[Tensor, Tensor]:
        if not free:
            return torch.ones_like(moments.ratio), drift_of(moments, num_groups=groups, shrink=shrink)
        return equalize(moments, num_groups=groups, shrink=shrink, **more)

    if len(counts) > 1:
        drifts = torch.stack([tried(groups, steps=COARSE)[1] for groups in counts])
        chosen = [counts[index] for index in drifts.argmin(0).tolist()]
    else:
        chosen = counts * len(names)
    before = {groups: drift_of(moments, num_groups=groups, shrink=shrink).tolist() for groups in set(chosen)}
    fits = {groups: tried(groups)[0] for groups in set(chosen)}
    after = {groups: drift_of(moments, num_groups=groups, shrink=shrink, t=t).tolist() for groups, t in fits.items()}
    made = []
    for index, (entry, groups) in enumerate(zip(entries, chosen, strict=True)):
        scale = _relative(network, entry, fits[groups][index]) if free else None
        entry = replace(entry, groups=groups, drift_before=rounded(before[groups][index]))
        entry = replace(entry, drift=rounded(after[groups][index]))
        made.append(_refitted(network, entry, scale, shrink))
    return made


def _signs(
    network: Network, entries: list[NormEntry], options: Options, free: bool
) -> list[tuple[NormEntry, tuple[float, ...] | None]]:
    """Choose signs for norms of one size without images, so that what their filters have in common cancels.

    What moves a group's mean from sample to sample is what many channels see at once. Were the means of the channels
    before a layer independent and alike, those behind it would have the covariance ``W·Wᵀ`` with the filters' sums over
    positions, W, in units of the deviations; a few random projections of W stand for it.
    """
    if not free:
        return [(entry, None) for entry in entries]
    shrink, groups = options.shrink_for(entries[0].groups_asked), entries[0].groups or 1
    sums = torch.stack([_projected_sums(network, entry) for entry in entries])
    values = sums.unflatten(-1, (groups, -1)).transpose(1, 2).flatten(0, 1)
    signs = balanced(values, alternating(values[:, 0].unsqueeze(-1)), flips=FLIPS).reshape(len(entries), -1)
    made = []
    for entry, sign in zip(entries, signs.tolist(), strict=True):
        made.append(_refitted(network, replace(entry, drift_before=entry.drift), tuple(sign), shrink))
    return made


def _projected_sums(network: Network, entry: NormEntry) -> Tensor:
    """Return (PROJECTIONS, C) random mixtures of the filters' sums over positions, one column per channel."""
    layer, parts = network.slots[entry.fed_by[0]], norm_parts(network.slots[entry.name])
    weight = layer._parameters["weight"].detach().float()  # type: ignore[union-attr]
    layout = {"transposed": bool(getattr(layer, "transposed", False)), "groups": int(getattr(layer, "groups", 1))}
    rows = filters(weight.contiguous(), **layout)  # type: ignore[arg-type]
    kernel = max(weight[0, 0].numel(), 1)
    sums = rows.unflatten(1, (-1, kernel)).sum(2)
    generator = torch.Generator().manual_seed(0)
    mixed: Tensor = torch.randn(PROJECTIONS, sums.shape[1], generator=generator).to(sums) @ sums.T
    unit: Tensor = (parts.var.detach().float() + parts.eps).sqrt()  # type: ignore[union-attr]
    return mixed / unit


def _relative(network: Network, entry: NormEntry, t: Tensor) -> tuple[float, ...]:
    """Return s = t/σ up to a factor per norm, which GroupNorm does not see; filters keep their size on average."""
    mean, var, eps = _running(network, entry)
    unit = deviation(mean, var, eps=eps)
    scale = t.to(unit) / unit * unit.log().mean().exp()
    return tuple(scale.half().clamp(-(2.0**14), 2.0**14).double().tolist())


def _refitted(
    network: Network, entry: NormEntry, scale: tuple[float, ...] | None, shrink: float
) -> tuple[NormEntry, tuple[float, ...] | None]:
    """Return the entry with the epsilon that belongs to scaled filters."""
    mean, var, eps = _running(network, entry)
    if scale is not None:
        _, mean, var = rescaled(torch.ones_like(mean), mean, var, mean.new_tensor(scale), eps=eps)
        if not usable(mean, var) or not all(map(math.isfinite, scale)) or 0.0 in scale:
            return replace(entry, not_equalized="its statistics leave no scale that could be stored"), None
    damped = eps + float(damping(mean, var, shrink=shrink, num_groups=entry.groups or 1))
    return replace(entry, eps=damped), scale


def _running(network: Network, entry: NormEntry) -> tuple[Tensor, Tensor, float]:
    """Return a norm's running mean and variance, (C,) in float64, and its epsilon."""
    parts = norm_parts(network.slots[entry.name])
    return parts.mean.detach().double(), parts.var.detach().double(), parts.eps  # type: ignore[union-attr]
