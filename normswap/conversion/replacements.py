"""Build what takes the place of a norm or a convolution; nothing is put in place here."""

import math
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normswap.errors import BadStatistics, PlanMismatch, UnsupportedModel, described
from normswap.layers.convs import WeightStandardized, layout_of, ws_class
from normswap.layers.equalization import rescaled, times
from normswap.layers.matching import centred, closed_form, scale_and_shift
from normswap.layers.norms import ChannelScale, FrozenBatchNorm, GroupNormAct, PositionNorm, carry_state
from normswap.layers.standardization import gain_and_offset
from normswap.networks.inputs import rebuild, tensors_in
from normswap.networks.network import Network
from normswap.networks.recognition import carried_modules, is_batch_norm, norm_parts
from normswap.networks.sharing import can_be_shared
from normswap.networks.surroundings import undisturbed
from normswap.networks.validation import is_finite, not_finite
from normswap.planning.choices import WS, Action, Affine
from normswap.planning.entry import ConvEntry, NormEntry
from normswap.planning.plan import Plan
from normswap.planning.statistics import bad_statistics, statistics_before, usable

Change = tuple[nn.Parameter, Callable[[], Tensor]]
"""A parameter and what computes its new value; in place there is no room for all new kernels at once."""


@dataclass(frozen=True)
class Match:
    """A norm's replacement and what its affine values follow from.

    Attributes:
        entry: The norm's entry.
        new: Its replacement, with the affine part that the norm had.
        eps: The norm's own epsilon.
        weight: γ as it acts on what the replacement will meet, (C,).
        bias: β, (C,).
        mean: (C,) mean that the replacement will meet.
        var: (C,) variance that the replacement will meet.
    """

    entry: NormEntry
    new: nn.GroupNorm | ChannelScale
    eps: float
    weight: Tensor
    bias: Tensor
    mean: Tensor
    var: Tensor


def rewritten_filters(network: Network, plan: Plan) -> Iterator[nn.Parameter]:
    """Yield the weights that get new values altogether: those of which a copy would be for nothing."""
    standard = (entry.name for entry in plan.convs if entry.ws is WS.STANDARD and entry.changes)
    for name in dict.fromkeys([*standard, *plan.scales]):
        weight = network.slots[name]._parameters.get("weight")
        if can_be_shared(weight):
            yield weight


def build_all(
    network: Network, plan: Plan, *, at_once: Container[int] = ()
) -> tuple[dict[int, nn.Module], list[Change]]:
    """Return every replacement by ``id`` of the layer it is for, and the values that parameters get in place.

    Args:
        network: The unconverted network, which the plan fits.
        plan: What to build.
        at_once: Weights, by ``id``, for whose new kernels there is memory.

    Raises:
        PlanMismatch: A module that should run after a norm is missing, or an epsilon is too large for a layer's type.
        BadStatistics: Running statistics are negative or not finite, or the variance of filters is not.
    """
    convs = {entry.name: entry for entry in plan.convs}
    like = _like(network, plan)
    replacements: dict[int, nn.Module] = {}
    changes: list[Change] = []
    matches: list[Match] = []
    for entry in plan.changes:
        old = network.slots[entry.name]
        _must_hold(entry, next((own for own in old.parameters() if own.is_floating_point()), like))
        if isinstance(entry, ConvEntry):
            kept = id(old._parameters.get("weight")) in at_once
            replacements[id(old)], values = _standardized(entry, old, plan.scales.get(entry.name), kept)
            changes += values
            continue
        if entry.action is Action.FREEZE:
            replacements[id(old)] = _frozen(entry, old)
            continue
        replacements[id(old)] = new = _norm(entry, old, like)
        statistics = statistics_before(entry, network, convs) if entry.affine is Affine.MATCH else None
        if statistics is not None and not new.weight.is_meta:
            matches.append(_match(entry, new, norm_parts(old).eps, *statistics, _scale(plan, entry)))
    made = {id(parameter) for parameter, _ in changes}
    scaled = chain.from_iterable(_scaled(network.slots[name], scale) for name, scale in plan.scales.items())
    return replacements, [*(own for own in scaled if id(own[0]) not in made), *changes, *_matched(matches)]


def _must_hold(entry: NormEntry | ConvEntry, like: Tensor) -> None:
    """Raise where a layer's type cannot hold the epsilon, with which it computes in float32 at least, or its root."""
    own, least = torch.finfo(like.dtype), torch.finfo(torch.float32)
    if entry.eps is not None and not (entry.eps <= max(own.max, least.max) and math.sqrt(entry.eps) <= own.max):
        raise PlanMismatch(
            f"{entry.name}: an epsilon of {entry.eps:.4g} is too large for {own.dtype}; make a plan with a smaller "
            "shrink=, of norms with smaller epsilons"
        )


def _scale(plan: Plan, norm: NormEntry) -> tuple[float, ...] | None:
    """Return the scales of a norm's channels: of the one layer before it, or slice by slice; 1 where filters stay."""
    if not norm.scaled_by:
        return plan.scales.get(norm.fed_by[0]) if len(norm.fed_by) == 1 else None
    scale = [1.0] * norm.channels
    for layer, start, stop in norm.scaled_by:
        scale[start:stop] = plan.scales[layer]
    return tuple(scale)


def _match(
    entry: NormEntry,
    new: nn.GroupNorm | ChannelScale,
    eps: float,
    mean: Tensor,
    var: Tensor,
    scale: tuple[float, ...] | None,
) -> Match:
    weight, bias = (value.detach().to(mean.device) for value in (new.weight, new.bias))
    if scale is not None:
        wide, mean, var = rescaled(weight.double(), mean, var, mean.new_tensor(scale), eps=eps)
        weight = wide.to(weight.dtype)
    return Match(entry, new, eps, weight, bias, mean, var)


def _scaled(layer: nn.Module, scale: tuple[float, ...]) -> Iterator[Change]:
    """Yield the filters and the bias of a layer, multiplied channel by channel."""
    for key in ("weight", "bias"):
        parameter = layer._parameters.get(key)
        if parameter is not None and not parameter.is_meta:
            yield parameter, partial(_times, layer, parameter, scale)


def _times(layer: nn.Module, parameter: nn.Parameter, scale: tuple[float, ...]) -> Tensor:
    """Return rows of a weight, or values of a bias, times their factors."""
    return times(parameter, scale, **layout_of(layer))


def _like(network: Network, plan: Plan) -> Tensor:
    """Return a tensor of the network's type and device, for norms that hold none; else one of its input's type."""
    seen = () if plan.inputs is None else tensors_in(rebuild(plan.inputs))
    made = (torch.empty(0, dtype=tensor.dtype) for tensor in seen)
    known = chain(network.model.parameters(), network.model.buffers(), made)
    return next((tensor for tensor in known if tensor.is_floating_point()), torch.empty(0))


def _norm(entry: NormEntry, old: nn.Module, like: Tensor) -> nn.GroupNorm | ChannelScale:
    """Build a norm's replacement, with the affine part it had; `like` where it has no tensor."""
    parts = norm_parts(old)
    new = _empty(entry, _then(entry, old))
    like = next((t for t in (parts.weight, parts.mean, *old.parameters()) if t is not None), like)
    for key, value, fresh in zip(("weight", "bias"), (parts.weight, parts.bias), parts.affine(like), strict=True):
        if not isinstance(value, nn.Parameter):
            fixed = fresh if value is None else value.detach().clone()
            value = nn.Parameter(fixed, requires_grad=False)
        new._parameters[key] = value
    used = [id(value) for value in (parts.weight, parts.bias, parts.mean, parts.var) if value is not None]
    carry_state(old, new, used)
    _carry_idle(old, new)
    _try_hooks(entry.name, new)
    return new


def _frozen(entry: NormEntry, old: nn.Module) -> FrozenBatchNorm:
    """Build a kept norm's replacement, with its own parameters and statistics."""
    if not isinstance(old, _BatchNorm) or old.running_mean is None or old.running_var is None:
        raise PlanMismatch(
            f"{entry.name}: the plan freezes statistics, {type(old).__name__} keeps none; "
            "apply the plan to the network it was made for"
        )
    new = FrozenBatchNorm(old, eps=entry.eps, then=_then(entry, old))
    carry_state(old, new)
    _carry_idle(old, new)
    return new


def _carry_idle(old: nn.Module, new: nn.Module) -> None:
    """Give a norm's replacement the children that did not run, but for those that are what it replaces."""
    for name, child in old.named_children():
        if not hasattr(new, name) and not any(map(is_batch_norm, child.modules())):
            new.add_module(name, child)


def _then(entry: NormEntry, old: nn.Module) -> dict[str, nn.Module]:
    """Return the modules by name that run after a norm."""
    named = carried_modules(old)
    then: dict[str, Any] = {name: getattr(old, name, None) for name in entry.then} if named is None else named
    if strange := [name for name, module in then.items() if not isinstance(module, nn.Module)]:
        raise PlanMismatch(
            f"{entry.name}: {strange[0]} is no module of it; apply the plan to the network it was made for"
        )
    return then


def _try_hooks(name: str, new: nn.Module) -> None:
    """Raise where a hook on saving that a norm had asks for tensors that its replacement does not have."""
    if not (new._state_dict_hooks or new._state_dict_pre_hooks):
        return
    try:
        with undisturbed(new):
            new.state_dict()
    except Exception as error:  # whatever the user's own code does
        raise UnsupportedModel(
            f"{name}: its state-dict hook does not run once converted ({described(error)}); remove that hook first"
        ) from error


def _empty(entry: NormEntry, then: dict[str, nn.Module]) -> nn.GroupNorm | ChannelScale:
    """Build the layer an entry asks for, its affine part still missing."""
    if entry.groups is None:
        return ChannelScale(entry.channels, then=then, device="meta")
    options: dict[str, Any] = {"eps": entry.eps, "affine": False}
    if entry.per_position:
        new: nn.GroupNorm = PositionNorm(entry.groups, entry.channels, then=then, stepped=entry.stepped, **options)
    elif then or entry.stepped:
        new = GroupNormAct(entry.groups, entry.channels, then=then, stepped=entry.stepped, **options)
    else:
        new = nn.GroupNorm(entry.groups, entry.channels, **options)
    new.affine = True
    return new


def _matched(matches: list[Match]) -> Iterator[Change]:
    """Yield the affine values that norms get once they are in place; norms of one size together, for speed."""
    alike: dict[Any, list[Match]] = {}
    for match in matches:
        if not usable(match.mean, match.var):
            raise bad_statistics(match.entry.name)
        own = match.entry.groups, match.entry.channels, match.entry.per_position
        size = *own, match.new.weight.dtype, match.mean.device
        alike.setdefault(size, []).append(match)
    for (groups, _, alone, *_), found in alike.items():
        mean, var = (torch.stack([getattr(match, key) for match in found]) for key in ("mean", "var"))
        weight, bias = (torch.stack([getattr(match, key) for match in found]) for key in ("weight", "bias"))
        eps = mean.new_tensor([match.eps for match in found])
        norm_eps = mean.new_tensor([match.entry.eps or 0.0 for match in found])
        if groups is None:
            values = scale_and_shift(weight, bias, mean, var, eps=eps)
        else:
            how: dict[str, Any] = {"num_groups": groups, "per_position": alone}
            values = closed_form(weight, bias, mean, var, eps=eps, norm_eps=norm_eps, **how)
        for match, gamma, beta in zip(found, *values, strict=True):
            if not all(map(is_finite, (gamma, beta))) and all(map(is_finite, (match.weight, match.bias))):
                raise BadStatistics(
                    f"{match.entry.name}: its γ or β would overflow in {torch.finfo(gamma.dtype).dtype}; convert the "
                    "network in float32, or pass affine='copy'"
                )
            for parameter, value in (match.new.weight, gamma), (match.new.bias, beta):
                yield parameter, partial(Tensor.detach, value)


def _standardized(
    entry: ConvEntry, old: nn.Module, scale: tuple[float, ...] | None, kept: bool
) -> tuple[WeightStandardized, list[Change]]:
    """Build a convolution's replacement; in the standard form its filters are centred and keep one common scale.

    Of filters that are to be scaled the adaptive form takes gain and offset as they will be. New filters are kept until
    they are put in place, or computed again where there is no room for that.
    """
    eps, adaptive = float(entry.eps or 0), entry.ws is WS.ADAPTIVE
    signs = scale is not None and set(map(abs, scale)) == {1.0}
    source, scaled = old._parameters.get("weight"), None
    if adaptive and scale is not None and not signs and source is not None and not source.is_meta:
        scaled = _times(old, source, scale)
    new = ws_class(type(old)).of(old, adaptive=adaptive, eps=eps, weight=scaled)
    weight, changes = new.raw_weight, list[Change]()
    if entry.ws is WS.STANDARD:
        rows = new.ws_filters(weight.detach())
        rows = rows if weight.is_meta else centred(rows)
        new.ws_gain = gain_and_offset(rows, eps)[0].to(weight.dtype)
        changes = [(weight, partial(new.ws_kernel, rows) if kept else partial(_centred_kernel, new))]
    elif scaled is not None and kept:
        changes = [(weight, partial(Tensor.detach, scaled))]
    elif signs and not weight.is_meta:
        new.ws_offset.mul_(weight.new_tensor(scale))  # type: ignore[union-attr]
    if weight.is_meta:
        return new, []
    if new.ws_gain is not None and not is_finite(new.ws_gain):
        if not is_finite(weight):
            raise not_finite(f"{entry.name}.weight")
        raise BadStatistics(
            f"{entry.name}: filters hold values whose squares overflow; repair the checkpoint or leave the layer plain "
            "with exclude="
        )
    return new, changes


def _centred_kernel(conv: WeightStandardized) -> Tensor:
    return conv.ws_kernel(centred(conv.ws_filters(conv.raw_weight.detach())))
