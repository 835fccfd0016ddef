"""The plan that a converted network carries, and whether a plan fits a network."""

from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from normswap.conversion.hub_class import describe_hub_class
from normswap.conversion.loaded_state import describe_state
from normswap.errors import PlanMismatch
from normswap.networks.network import Network
from normswap.networks.recognition import has_kernel, is_batch_norm, norm_parts, out_channels, rows_of
from normswap.networks.validation import unwrap
from normswap.planning.choices import Role
from normswap.planning.entry import NormEntry, renamed
from normswap.planning.plan import Plan
from normswap.sources.provenance import remember
from normswap.sources.transformers_config import describe_pretrained

PLAN = "_normswap_plan"
"""Attribute of a converted model that holds its plan."""


def carry_plan(model: nn.Module, plan: Plan) -> None:
    """Keep the plan on a converted model, where `plan_of` finds it and timm's and transformers' own exporters do."""
    vars(model)[PLAN] = plan
    remember(model, plan.to_dict())
    describe_pretrained(model, partial(_below, plan))
    describe_hub_class(model)
    describe_state(model)


def _below(plan: Plan, holder: str) -> dict[str, Any] | None:
    """Return as JSON data the plan of what a module holds, by its names there; None where nothing in it changes."""
    if not holder:
        return plan.to_dict()
    inner = f"{holder}."
    held = (entry for entry in plan.entries if entry.name.startswith(inner))
    entries = tuple(renamed(entry, lambda name: name.removeprefix(inner)) for entry in held)
    own = replace(plan, entries=entries, inputs=None, scales={})
    return own.to_dict() if own.changes else None


def carried_plan(model: nn.Module) -> Plan | None:
    """Return the plan that a network carries, or None."""
    plan = vars(model).get(PLAN)
    return plan if isinstance(plan, Plan) else None


def plan_of(model: nn.Module) -> Plan:
    """Return the plan that a converted model was made with.

    >>> plan_of(convert(model)).norms[0].groups
    32

    Raises:
        PlanMismatch: The model was not converted by normswap, or only a part of a converted model was passed.
    """
    plan = carried_plan(unwrap(model))
    if plan is None:
        raise PlanMismatch(f"{type(model).__name__} carries no plan; pass the model that normswap.convert returned")
    return plan


def must_fit(network: Network, plan: Plan) -> None:
    """Raise unless a network is the unconverted one that a plan was made for, and the plan can be carried out.

    Raises:
        PlanMismatch: With the layer.
    """
    for entry in plan.changes:
        if entry.flaw:
            raise PlanMismatch(
                f"{entry.name}: the plan cannot be carried out ({entry.flaw}); make one with normswap.inspect"
            )
        module = network.slots.get(entry.name)
        if module is None:
            raise PlanMismatch(
                f"{entry.name}: the plan names it, {network.kind} has no such layer; apply the plan to the network it "
                "was made for"
            )
        fits = is_batch_norm(module) if entry.role is Role.NORM else has_kernel(module)
        found = norm_parts(module).num_channels if is_batch_norm(module) else out_channels(module)
        same_names = sorted(network.names[id(module)]) == sorted((entry.name, *entry.aliases))
        if not fits or found != entry.channels or not same_names:
            raise PlanMismatch(
                f"{entry.name}: the plan was made for a {entry.kind} of {entry.channels} channels, found "
                f"{type(module).__name__} of {found}; apply the plan to the unconverted network it was made for"
            )
        if pinned := network.pinned_at(entry.name):
            raise PlanMismatch(f"{entry.name}: {pinned}")
        for feeder, start, stop in entry.scaled_by if isinstance(entry, NormEntry) else ():
            if len(plan.scales.get(feeder, ())) != stop - start or stop > entry.channels:
                raise PlanMismatch(
                    f"{entry.name}: the plan has its channels {start} to {stop} scaled by {feeder}, for which it holds "
                    f"{len(plan.scales.get(feeder, ()))} scales; make one with normswap.inspect"
                )
    for name, scale in plan.scales.items():
        layer = network.slots.get(name)
        if layer is None or layer._parameters.get("weight") is None or rows_of(layer) != len(scale):
            raise PlanMismatch(
                f"{name}: the plan scales {len(scale)} filters of it, {network.kind} has no such layer; apply the plan "
                "to the network it was made for"
            )
