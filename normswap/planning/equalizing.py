"""Which norms can be equalized, and with which scales: from what images show, or from running statistics alone."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from normswap.layers.equalization import deviation, drift_of, equalize, rescaled
from normswap.layers.joint_equalization import FIXED, Reader, equalize_jointly
from normswap.layers.matching import damping
from normswap.networks.network import Network
from normswap.networks.randomness import normal
from normswap.networks.recognition import norm_parts
from normswap.planning.choices import WS, Action, Affine
from normswap.planning.entry import ConvEntry, NormEntry
from normswap.planning.fitting import group_candidates, rounded
from normswap.planning.freedom import Freedom, freedoms
from normswap.planning.groups import least
from normswap.planning.measuring import Images, Seen, moments_of
from normswap.planning.options import Options
from normswap.planning.response import responses
from normswap.planning.scaling import TOLERANCE
from normswap.tracing.facts import Trace

Scales = dict[str, tuple[float, ...]]
"""A factor for every output channel, by layer."""

Fit = tuple[NormEntry, tuple[float, ...] | None]
"""A norm's entry and the scales of its channels; None where filters stay."""

NARROW, BRIEF = 0.35, 2
"""Largest log|t| where only filters tell, and steps to fit it: neither 0.7 nor more steps kept more."""

LOSS, LESS = 0.1, 4
"""Sum of the squared drifts from which most answers are lost, and how many times less one group must leave to be named.
On ImageNet networks a sum of 0.004 kept 73 % of the answers, 0.2 kept 28 % and 0.7 kept 13 %."""

EXPECTED_LOSS = 1
"""The same as running statistics alone have it. Two ImageNet networks kept 55 and 69 % at 0.05 and 0.08, 21 and 19 % at
1.4 and 2.3, 15 and 9 % at 4.5 and 8.3; ten digits are told apart at 3.6, too."""

POSITIONS = "its statistics are those of each position, equalization is for those of a sample"
"""Why filters before some norms stay as they are."""

LARGEST = 2.0**14
"""Largest scale that is stored; 16 bits end at four times that."""

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
    free = dict[str, Freedom]()
    for by_filters in (False, True):
        matched = {
            name: entry
            for name, entry in norms.items()
            if entry.action is Action.GROUP_NORM and entry.affine is Affine.MATCH and (name in images) != by_filters
        }
        able = {
            name
            for name, entry in matched.items()
            if _has_values(network, name) and entry.drift is not None and standard(name) is None
        }  # one behind the standard form will meet other statistics than the ones that images show now
        alone = {name for name, entry in matched.items() if entry.per_position}
        if options.equalize and matched:
            whole = {name: entry for name, entry in matched.items() if not entry.per_position}
            free |= freedoms(network, trace, whole, convs, options, able=able - alone, by_filters=by_filters)
            free |= dict.fromkeys(alone, Freedom((), POSITIONS))
        else:
            free |= dict.fromkeys(matched, Freedom((), "not asked for"))
        found |= {name: replace(norms[name], not_equalized=free[name].reason(norms[name].channels)) for name in matched}
        for names in _together({name: free[name] for name in matched if name in able - alone}):
            entry, own = found[names[0]], free[names[0]]
            if len(names) > 1 or (own.places and (entry.not_equalized or len(own.layers) < len(own.places))):
                made = _jointly(network, [found[name] for name in names], free, options, images)
                for entry, scale in made:
                    found[entry.name] = _noted(entry, free[entry.name], scale, scales)
                continue
            seen = 0 if by_filters else sum(map(len, images[entry.name].first))
            size = entry.channels, entry.groups, entry.groups_asked, group_candidates(entry), bool(own.places)
            alike.setdefault((*size, seen, norm_parts(network.slots[entry.name]).mean.device), []).append(entry.name)  # type: ignore[union-attr]
    untold = any(is_free and not seen for *_, is_free, seen, _ in alike)
    then, told = {name: entry.then for name, entry in norms.items()}, dict[str, Seen]()
    for graph in reversed(trace.graphs) if untold else ():
        told |= responses(network, graph, then)
    for (*_, is_free, seen, _), names in alike.items():
        entries = [found[name] for name in names]
        made = (
            _from_images(network, entries, options, images, is_free)
            if seen
            else _from_filters(network, entries, options, is_free, told)
        )
        for entry, scale in made:
            found[entry.name] = _noted(entry, free[entry.name], scale, scales)
    return found, scales, list(_advice(network, found, options, images))


def _has_values(network: Network, name: str) -> bool:
    """Tell whether a norm has running statistics with values."""
    mean = norm_parts(network.slots[name]).mean
    return mean is not None and not mean.is_meta


def _together(free: Mapping[str, Freedom]) -> list[list[str]]:
    """Return the norms' names in sets that no scale is common to."""
    sets: dict[str, list[str]] = {}  # by layer, and by norm
    for name, own in free.items():
        joined = [name]
        for layer in own.layers:
            if (other := sets.get(f"layer:{layer}")) is not None and other is not joined:
                joined, less = (other, joined) if len(other) > len(joined) else (joined, other)
                joined.extend(less)
                for member in less:
                    sets |= dict.fromkeys([f"layer:{of}" for of in free[member].layers], joined)
        sets |= dict.fromkeys([f"layer:{of}" for of in own.layers], joined)
        sets |= {f"norm:{member}": joined for member in joined}
    return list({id(own): own for key, own in sets.items() if key.startswith("norm:")}.values())


def _noted(entry: NormEntry, free: Freedom, scale: tuple[float, ...] | None, scales: Scales) -> NormEntry:
    """Note a norm's scales by layer, and which of its channels they are for."""
    if scale is None:
        return entry
    scales |= {layer: scale[start:stop] for layer, start, stop in free.places}
    simple = free.places == ((entry.fed_by[0], 0, entry.channels),) and len(entry.fed_by) == 1
    return entry if simple else replace(entry, scaled_by=free.places)


def _jointly(
    network: Network, entries: list[NormEntry], free: Mapping[str, Freedom], options: Options, images: Images
) -> list[Fit]:
    """Fit norms that have scales in common, or channels whose filters stay; all are scaled or none."""
    layers: dict[str, range] = {}
    count = 0
    for entry in entries:
        for layer, start, stop in free[entry.name].places:
            if layer not in layers:
                layers[layer] = range(count, count := count + stop - start)
    units = [_unit(network, entry) for entry in entries]
    level = float(torch.cat(units).log().mean().exp())
    readers = list[Reader]()
    for entry, unit in zip(entries, units, strict=True):
        moments = moments_of([images[entry.name]], network, [entry.name])
        index = torch.full((entry.channels,), FIXED, device=unit.device)
        for layer, start, stop in free[entry.name].places:
            index[start:stop] = torch.arange(layers[layer].start, layers[layer].stop, device=unit.device)
        shrink = options.shrink_for(entry.groups_asked, equalized=True)
        tries = {
            groups: Reader(moments, (unit / level).to(moments.first), index, groups, shrink)
            for groups in _group_counts(entry)
        }
        if len(tries) > 1:
            tries = {(best := least({groups: _left(one, count) for groups, one in tries.items()})): tries[best]}
        readers.extend(tries.values())
    scales = equalize_jointly(readers, count).double()
    scales = _as_stored(scales).to(readers[0].unit)
    made, drifts = list[Fit](), list[tuple[float, float]]()
    for entry, reader in zip(entries, readers, strict=True):
        before, after = (
            float(drift_of(reader.moments, num_groups=reader.num_groups, shrink=reader.shrink, t=reader.t(own)))
            for own in (torch.ones_like(scales), scales)
        )
        drifts.append((before, after))
        vector = tuple(reader.of_channels(scales).double().tolist())
        entry = replace(entry, groups=reader.num_groups, drift_before=rounded(before), drift=rounded(after))
        made += _refitted(network, [(entry, vector)], reader.shrink)
    obstacle = next((entry.not_equalized for entry, scale in made if scale is None), "")
    if not obstacle and sum(after**2 - before**2 for before, after in drifts) >= 0:
        obstacle = "no scales leave the norms that share them less drift in all"
    if not obstacle:
        return made
    stay = list[Fit]()
    for (entry, _), reader in zip(made, readers, strict=True):
        shrink = options.shrink_for(entry.groups_asked, equalized=False)
        t = reader.t(torch.ones_like(scales))
        drift = rounded(float(drift_of(reader.moments, num_groups=reader.num_groups, shrink=shrink, t=t)))
        entry = replace(entry, not_equalized=obstacle, drift_before=drift, drift=drift)
        stay += _refitted(network, [(entry, None)], shrink)
    return stay


def _left(reader: Reader, count: int) -> float:
    """Return the drift that a few steps leave to a norm by itself."""
    t = reader.t(equalize_jointly([reader], count, steps=COARSE))
    return float(drift_of(reader.moments, num_groups=reader.num_groups, shrink=reader.shrink, t=t))


def _group_counts(entry: NormEntry) -> list[int]:
    """Return the group counts that are compared for a norm."""
    counts = list(group_candidates(entry))
    return [count for count in counts if count <= FEW] or counts


def _unit(network: Network, entry: NormEntry) -> Tensor:
    """Return the (C,) deviation of a norm's channels, which without scales they stand in."""
    mean, var, eps = _running(network, entry)
    return deviation(mean, var, eps=eps)


def _unscaled(network: Network, entries: list[NormEntry]) -> Tensor:
    """Return the (B, C) t of norms of one size behind filters as they are, up to a factor per norm."""
    units = torch.stack([_unit(network, entry) for entry in entries])
    return units / units.log().mean(1, keepdim=True).exp()


def _advice(network: Network, norms: Mapping[str, NormEntry], options: Options, images: Images) -> Iterator[str]:
    """Say so where the group count that was asked for loses most of the function and one group would keep it."""
    asked = [entry for entry in norms.values() if entry.groups_asked not in ("auto", 1) and entry.drift]
    expected = sum(entry.drift**2 for entry in asked if entry.drift and entry.name not in images)
    if expected >= EXPECTED_LOSS:
        yield (
            "the groups asked for may lose much of what the network knows: as running statistics have it, samples' own "
            f"statistics move the norms' outputs by {expected:.2g} in all (sum of squared drifts); compare groups="
            "'auto' (--groups auto), and give images"
        )
    asked = [entry for entry in asked if entry.name in images]
    lost = sum(entry.drift**2 for entry in asked if entry.drift)
    if lost < LOSS:
        return
    fitted = 0.0
    for entry in asked:
        moments = moments_of([images[entry.name]], network, [entry.name])
        shrink = options.shrink_for(entry.groups_asked, equalized=not entry.not_equalized)
        t = _unscaled(network, [entry]).to(moments.first)
        if not entry.not_equalized:
            t = equalize(moments, num_groups=1, shrink=shrink, steps=COARSE)[0]
        fitted += float(drift_of(moments, num_groups=1, shrink=shrink, t=t).square())
    if fitted * LESS < lost:
        yield (
            "the groups asked for lose much of what the network knows: samples' own statistics move the norms' outputs "
            f"by {lost:.2g} in all (sum of squared drifts), with one group (--groups 1) by {fitted:.2g}"
        )


def _from_images(network: Network, entries: list[NormEntry], options: Options, images: Images, free: bool) -> list[Fit]:
    """Fit norms of one size on what images showed; those that are not free are only measured."""
    names = [entry.name for entry in entries]
    moments = moments_of([images[name] for name in names], network, names)
    shrink = options.shrink_for(entries[0].groups_asked, equalized=free)
    counts = _group_counts(entries[0])
    plain = _unscaled(network, entries).to(moments.first)

    def tried(groups: int, **more: Any) -> tuple[Tensor, Tensor]:
        if not free:
            return plain, drift_of(moments, num_groups=groups, shrink=shrink, t=plain)
        return equalize(moments, num_groups=groups, shrink=shrink, **more)

    if len(counts) > 1:
        drifts = {groups: tried(groups, steps=COARSE)[1].tolist() for groups in counts}
        chosen = [least({groups: own[index] for groups, own in drifts.items()}) for index in range(len(names))]
    else:
        chosen = counts * len(names)
    before = {groups: drift_of(moments, num_groups=groups, shrink=shrink, t=plain).tolist() for groups in set(chosen)}
    fits = {groups: tried(groups)[0] for groups in set(chosen)}
    after = {groups: drift_of(moments, num_groups=groups, shrink=shrink, t=t).tolist() for groups, t in fits.items()}
    made = list[Fit]()
    for index, (entry, groups) in enumerate(zip(entries, chosen, strict=True)):
        scale = _relative(network, entry, fits[groups][index]) if free else None
        entry = replace(entry, groups=groups, drift_before=rounded(before[groups][index]))
        entry = replace(entry, drift=rounded(after[groups][index]))
        made.append((entry, scale))
    return _refitted(network, made, shrink)


def _from_filters(
    network: Network, entries: list[NormEntry], options: Options, free: bool, told: Mapping[str, Seen]
) -> list[Fit]:
    """Fit norms of one size on what constants that pass through the filters do to their inputs.

    They tell by how much scales lessen the drift, not how large it is.
    """
    if not free:
        return [(entry, None) for entry in entries]
    if any(entry.name not in told for entry in entries):
        return [(replace(entry, not_equalized="filters alone do not tell what it sees"), None) for entry in entries]
    names = [entry.name for entry in entries]
    moments = moments_of([told[name] for name in names], network, names)
    groups, shrink = entries[0].groups or 1, options.shrink_for(entries[0].groups_asked, equalized=True)
    fits, _ = equalize(moments, num_groups=groups, shrink=shrink, bound=NARROW, steps=BRIEF)
    both = torch.stack([_unscaled(network, entries).to(fits), fits])
    plain, left = drift_of(moments, num_groups=groups, shrink=shrink, t=both)
    less = (left / plain.clamp_min(1e-30)).tolist()
    made = []
    for entry, t, share in zip(entries, fits, less, strict=True):
        drift = rounded(entry.drift * min(share, 1.0)) if entry.drift is not None else None
        entry = replace(entry, drift_before=entry.drift, drift=drift)
        made.append((entry, _relative(network, entry, t)))
    return _refitted(network, made, shrink)


def _relative(network: Network, entry: NormEntry, t: Tensor) -> tuple[float, ...]:
    """Return s = t/σ up to a factor per norm, which GroupNorm does not see; filters keep their size on average."""
    unit = _unit(network, entry)
    scale = t.to(unit) / unit * unit.log().mean().exp()
    return tuple(_as_stored(scale).double().tolist())


def _as_stored(scale: Tensor) -> Tensor:
    """Return scales as a plan holds them, in 16 bits."""
    return scale.half().clamp(-LARGEST, LARGEST)


def _refitted(network: Network, made: Sequence[Fit], shrink: float) -> list[Fit]:
    """Return entries with the epsilons that belong to scaled filters; norms of one size together, for speed."""
    alike: dict[Any, list[int]] = {}
    running = [_running(network, entry) for entry, _ in made]
    for index, ((entry, scale), (mean, _, eps)) in enumerate(zip(made, running, strict=True)):
        alike.setdefault((entry.channels, entry.groups or 1, eps, scale is None, mean.device), []).append(index)
    found = dict[int, Fit]()
    for (_, groups, eps, is_plain, _), indices in alike.items():
        mean, var = torch.stack([running[i][0] for i in indices]), torch.stack([running[i][1] for i in indices])
        sound = [True] * len(indices)
        if not is_plain:
            factors, before = mean.new_tensor([made[index][1] for index in indices]), (mean, var)
            weight, mean, var = rescaled(torch.ones_like(mean), mean, var, factors, eps=eps)
            usable = (mean + var).isfinite().all(1) & (var >= 0).all(1)
            usable &= (factors.isfinite() & (factors != 0)).all(1)
            sound = (usable & _are_same_norms(before, (mean, var), weight, factors, eps)).tolist()
        damped = (eps + damping(mean, var, shrink=shrink, num_groups=groups)).tolist()
        for index, is_sound, own in zip(indices, sound, damped, strict=True):
            entry, scale = made[index]
            if is_sound:
                found[index] = replace(entry, eps=own), scale
                continue
            reason = "its statistics leave no scale that could be stored"
            entry = replace(entry, not_equalized=reason, drift=entry.drift_before)
            found[index] = _refitted(network, [(entry, None)], shrink)[0]
    return [found[index] for index in range(len(made))]


def _are_same_norms(
    before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor], weight: Tensor, factors: Tensor, eps: float
) -> Tensor:
    """Tell of (B, C) norms whether torch's BatchNorm makes of scaled channels what it made of plain ones.

    It runs on random samples; the channels of all norms are those of one.
    """
    generator = torch.Generator().manual_seed(0)
    noise = normal((4, factors.shape[1]), generator).to(factors)
    x = before[0] + before[1].sqrt() * noise[:, None]
    mean, var = (value.flatten() for value in before)
    expected = F.batch_norm(x.flatten(1), mean, var, eps=eps).view_as(x)
    mean, var = (value.flatten() for value in after)
    found = F.batch_norm((x * factors).flatten(1), mean, var, weight.flatten(), eps=eps).view_as(x)
    return (found - expected).abs().amax((0, 2)) <= TOLERANCE * expected.abs().amax((0, 2))


def _running(network: Network, entry: NormEntry) -> tuple[Tensor, Tensor, float]:
    """Return a norm's running mean and variance, (C,) in float64, and its epsilon."""
    parts = norm_parts(network.slots[entry.name])
    return parts.mean.detach().double(), parts.var.detach().double(), parts.eps  # type: ignore[union-attr]
