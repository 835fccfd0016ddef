"""Apply a plan to a model: the only file that changes one."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import chain
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from normswap.checkpoint.config import remember
from normswap.errors import BadStatistics, PlanMismatch, UnsupportedModel
from normswap.layers.convs import WeightStandardized, ws_class
from normswap.layers.matching import centred, closed_form, scale_and_shift
from normswap.layers.norms import ChannelScale, GroupNormAct, carry_state
from normswap.layers.standardization import gain_and_offset, kernel
from normswap.networks.copying import copy_model, module_names
from normswap.networks.inputs import rebuild
from normswap.networks.recognition import fold_methods, has_kernel, is_batch_norm, norm_parts, out_channels
from normswap.networks.tensors import tensors_in
from normswap.networks.validation import is_finite, not_finite, unwrap
from normswap.planning.plan import Entry, Plan, as_plan
from normswap.planning.statistics import statistics_before, usable

PLAN = "_normswap_plan"
"""Attribute of a converted model that holds its plan."""

Change = tuple[nn.Parameter, Callable[[], Tensor]]
"""A parameter and what computes its new value; in place there is no room for all new kernels at once."""
Match = tuple[Entry, nn.GroupNorm | ChannelScale, float, Tensor, Tensor]
"""A norm's entry and replacement, the old epsilon, and the (C,) mean and variance it meets."""


def apply(model: nn.Module, plan: Plan | str | PathLike[str], *, inplace: bool = False) -> nn.Module:
    """Replace the layers that `plan` names, and nothing else.

    >>> state = converted.state_dict()                      # after fine-tuning
    >>> fresh = apply(timm.create_model("resnet50"), "OUT/config.json")
    >>> fresh.load_state_dict(state)

    Every replacement is built before the first is put in place; an error leaves the model as it was. The Parameter
    objects are carried over, so an optimizer made before an in-place conversion stays valid. Works on the meta device.

    Args:
        model: The network the plan was made for, or one of the same architecture.
        plan: A plan, or the path of a converted checkpoint's ``config.json``.
        inplace: Change `model` itself instead of a copy.

    Returns:
        The converted network.

    Raises:
        PlanMismatch: A layer is missing, is of another kind or has another number of channels.
        BadStatistics: A norm's running statistics are negative or not finite, or the variance of filters is not.
    """
    plan = as_plan(plan)
    model = unwrap(model)
    verify(model, plan)
    model = model if inplace else copy_model(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    convs = {entry.name: entry for entry in plan.convs}
    like = _like(model, plan)
    replacements: dict[int, nn.Module] = {}
    changes: list[Change] = []
    matches: list[Match] = []
    for entry in plan.changes:
        old = modules[entry.name]
        if entry.role == "norm":
            replacements[id(old)] = new = _replaced_norm(entry, old, like)
            statistics = statistics_before(entry, modules, convs) if entry.affine == "match" else None
            if statistics is not None and not new.weight.is_meta:
                matches.append((entry, new, norm_parts(old).eps, *statistics))
        else:
            replacements[id(old)], values = _weight_standardized(entry, old)
            changes += values
    changes += _matched(matches)
    _refuse_to_fold(model, replacements)
    model = replace_modules(model, replacements)
    with torch.no_grad():
        for parameter, value in changes:
            parameter.copy_(value())
    set_plan(model, plan)
    return model


def set_plan(model: nn.Module, plan: Plan) -> None:
    """Keep the plan on a converted model, where `plan_of` finds it and where timm's own exporter does."""
    vars(model)[PLAN] = plan
    remember(model, plan)


def plan_of(model: nn.Module) -> Plan:
    """Return the plan that a converted model was made with.

    Raises:
        PlanMismatch: The model was not converted by normswap, or only a part of a converted model was passed.
    """
    plan = getattr(unwrap(model), PLAN, None)
    if not isinstance(plan, Plan):
        raise PlanMismatch(f"{type(model).__name__} carries no plan; pass the model that normswap.convert returned")
    return plan


def verify(model: nn.Module, plan: Plan) -> None:
    """Raise `PlanMismatch` unless `model` is an unconverted network that the plan fits."""
    names = module_names(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    for entry in plan.changes:
        module = modules.get(entry.name)
        if module is None:
            raise PlanMismatch(f"{entry.name}: the plan names it, {type(model).__name__} has no such layer; "
                               "apply the plan to the network it was made for")  # fmt: skip
        fits = is_batch_norm(module) if entry.role == "norm" else has_kernel(module)
        found = norm_parts(module).num_channels if is_batch_norm(module) else out_channels(module)
        if not fits or found != entry.channels or sorted(names[id(module)]) != sorted((entry.name, *entry.aliases)):
            raise PlanMismatch(
                f"{entry.name}: the plan was made for a {entry.kind} of {entry.channels} channels, found "
                f"{type(module).__name__} of {found}; apply the plan to the unconverted network it was made for"
            )


def _like(model: nn.Module, plan: Plan) -> Tensor:
    """Return a tensor of the network's type and device, for norms that hold none; else one of its input's type."""
    seen = () if plan.inputs is None else tensors_in(rebuild(plan.inputs))
    made = (torch.empty(0, dtype=tensor.dtype) for tensor in seen)
    return next((t for t in chain(model.parameters(), model.buffers(), made) if t.is_floating_point()), torch.empty(0))


def _replaced_norm(entry: Entry, old: nn.Module, like: Tensor) -> nn.GroupNorm | ChannelScale:
    """Build a norm's replacement, with the affine part it had; `like` where it has no tensor."""
    assert entry.eps is not None
    parts = norm_parts(old)
    then: dict[str, Any] = {name: getattr(old, name, None) for name in entry.then} if parts.then is None else parts.then
    if strange := [name for name, module in then.items() if not isinstance(module, nn.Module)]:
        raise PlanMismatch(
            f"{entry.name}: {strange[0]} is no module of it; apply the plan to the network it was made for"
        )
    new = _empty(entry, then)
    like = next((t for t in (parts.weight, parts.mean, *old.parameters()) if t is not None), like)
    for key, value, fresh in (("weight", parts.weight, 1.0), ("bias", parts.bias, 0.0)):
        if not isinstance(value, nn.Parameter):
            fixed = (
                torch.full((entry.channels,), fresh, dtype=like.dtype, device=like.device) if value is None else value
            )
            value = nn.Parameter(fixed.detach().clone(), requires_grad=False)
        new._parameters[key] = value
    carry_state(old, new)
    return new


def _empty(entry: Entry, then: dict[str, nn.Module]) -> nn.GroupNorm | ChannelScale:
    """Build the layer an entry asks for, its affine part still missing."""
    assert entry.eps is not None
    if entry.groups is None:
        return ChannelScale(entry.channels, then=then, device="meta")
    if then:
        new: nn.GroupNorm = GroupNormAct(entry.groups, entry.channels, then=then, eps=entry.eps, affine=False)
    else:
        new = nn.GroupNorm(entry.groups, entry.channels, eps=entry.eps, affine=False)
    new.affine = True
    return new


def _matched(matches: list[Match]) -> Iterator[Change]:
    """Yield the affine values that norms get once they are in place; norms of one size together, for speed."""
    alike: dict[Any, list[Match]] = {}
    for match in matches:
        entry, new, _, mean, var = match
        if not usable(mean, var):
            raise BadStatistics(f"{entry.name}: running statistics are negative or not finite; repair the checkpoint "
                                "or pass affine='copy'")  # fmt: skip
        alike.setdefault((entry.groups, entry.channels, new.weight.dtype, mean.device), []).append(match)
    for (groups, *_), found in alike.items():
        entries, news, olds, means, variances = zip(*found, strict=True)
        mean, var = torch.stack(means), torch.stack(variances)
        weight, bias = (
            torch.stack([getattr(new, key).detach().to(mean.device) for new in news]) for key in ("weight", "bias")
        )
        eps, norm_eps = mean.new_tensor(olds), mean.new_tensor([entry.eps or 0.0 for entry in entries])
        if groups is None:
            values = scale_and_shift(weight, bias, mean, var, eps=eps)
        else:
            values = closed_form(weight, bias, mean, var, eps=eps, norm_eps=norm_eps, num_groups=groups)
        for new, gamma, beta in zip(news, *values, strict=True):
            yield from ((new.weight, partial(Tensor.detach, gamma)), (new.bias, partial(Tensor.detach, beta)))


def _weight_standardized(entry: Entry, old: nn.Module) -> tuple[nn.Module, list[Change]]:
    """Build a convolution's replacement; in the standard form its filters are centred and keep one common scale."""
    assert entry.eps is not None
    new = ws_class(type(old)).of(old, adaptive=entry.ws == "adaptive", eps=entry.eps)
    weight, changes = new._parameters["weight"], list[Change]()
    assert weight is not None
    if entry.ws == "standard":
        gain, _ = gain_and_offset(centred(new._filters(weight.detach())), entry.eps)
        new.ws_gain = nn.Parameter(gain.to(weight.dtype), requires_grad=False)
        changes = [(weight, partial(_centred_kernel, new, weight))]
    assert new.ws_gain is not None
    if weight.is_meta:
        return new, []
    if not is_finite(new.ws_gain):
        if not is_finite(weight):
            raise not_finite(f"{entry.name}.weight")
        raise BadStatistics(
            f"{entry.name}: filters hold values whose squares overflow; repair the checkpoint or leave the layer plain "
            "with exclude="
        )
    return new, changes


def _centred_kernel(conv: WeightStandardized, weight: nn.Parameter) -> Tensor:
    return kernel(centred(conv._filters(weight.detach())), weight, **conv._layout())


def _refuse_to_fold(model: nn.Module, replacements: Mapping[int, nn.Module]) -> None:
    """Make the methods that fold BatchNorm raise on every module that loses one: some would return wrong numbers."""
    norms = {key for key, new in replacements.items() if not isinstance(new, WeightStandardized)}
    for name, module in model.named_modules():
        methods = fold_methods(module)
        if methods and any(id(inner) in norms for inner in module.modules()):
            where = name or type(module).__name__
            vars(module).update({method: partial(_refuse, f"{where}.{method}") for method in methods})


def _refuse(method: str, *_: object, **__: object) -> None:
    raise UnsupportedModel(
        f"{method}() folds BatchNorm into convolutions and this network has none left; fold before converting or not"
    )


def replace_modules(model: nn.Module, replacements: Mapping[int, nn.Module]) -> nn.Module:
    """Put every replacement, by ``id`` of its original, into every slot that holds the original.

    Returns:
        The model, or its replacement where the model itself is replaced.
    """
    for module in list(model.modules()):
        for slots in (module._modules, *_plain_containers(module)):
            for key, child in list(slots.items()) if isinstance(slots, dict) else list(enumerate(slots)):
                if isinstance(child, nn.Module) and id(child) in replacements:
                    slots[key] = replacements[id(child)]  # type: ignore[index, call-overload]
    return replacements.get(id(model), model)


def _plain_containers(module: nn.Module) -> list[dict[object, object] | list[object]]:
    """Return the module's own attributes, and the lists and dicts among them: some hold modules a second time."""
    own = vars(module)
    nested = [value for key, value in own.items() if not key.startswith("_") and isinstance(value, (list, dict))]
    return [own, *nested]  # type: ignore[list-item]
