"""The plan as a converted network has it now: users change layers after a conversion, and convert again."""

from dataclasses import replace
from typing import Any

from torch import nn

from normswap.errors import CheckpointError
from normswap.layers.convs import WeightStandardized
from normswap.layers.norms import ChannelScale, FrozenBatchNorm, GroupNormAct, PositionNorm, takes_steps
from normswap.networks.network import Network
from normswap.networks.recognition import has_kernel, is_batch_norm, out_channels
from normswap.planning.choices import WS, Action, Affine
from normswap.planning.entry import ConvEntry, NormEntry
from normswap.planning.plan import Plan

WAY_ON = "put it back, or keep model.state_dict() and the code that builds the network"


def joined(earlier: Plan, later: Plan, network: Network) -> Plan:
    """Return one plan for what two conversions of a network did, one after the other.

    Args:
        earlier: What the first one did.
        later: What the second one did, for which the layers of the first were left as they are.
        network: The network, whose layers' order the entries get.
    """
    entries = {entry.name: entry for entry in earlier.entries}
    entries |= {e.name: e for e in later.entries if e.changes or e.name not in entries or not entries[e.name].changes}
    order = {name: place for place, name in enumerate(network.modules)}
    ordered = sorted(entries.values(), key=lambda entry: order.get(entry.name, len(order)))
    return replace(later, entries=tuple(ordered), scales={**earlier.scales, **later.scales})


def present_plan(network: Network, plan: Plan) -> Plan:
    """Return a plan with group counts, epsilons and forms as the network's layers have them now.

    Raises:
        CheckpointError: A layer is gone, or has become one that no plan describes.
    """
    return plan.with_entries({entry.name: _present(network, entry) for entry in plan.changes})


def _present(network: Network, entry: NormEntry | ConvEntry) -> NormEntry | ConvEntry:
    module = network.slots.get(entry.name)
    if module is None:
        raise CheckpointError(f"{entry.name}: was converted and is no part of the network any more; {WAY_ON}")
    if sorted(network.names[id(module)]) != sorted((entry.name, *entry.aliases)):
        raise CheckpointError(f"{entry.name}: is held under other names than when it was converted; {WAY_ON}")
    if computed := _computed(module, entry):
        raise CheckpointError(
            f"{entry.name}: its {computed} is computed (pruned or parametrized), which a checkpoint cannot describe; "
            "make that permanent, or save model.state_dict() of normswap.fold(model)"
        )
    found = _conv(module, entry) if isinstance(entry, ConvEntry) else _norm(module, entry)
    if found is None or found.flaw:
        raise CheckpointError(
            f"{entry.name}: has become a {type(module).__name__} that a checkpoint cannot describe; {WAY_ON}"
        )
    return found


def _computed(module: nn.Module, entry: NormEntry | ConvEntry) -> str | None:
    """Return the tensor that a tool computes and without which nothing can be put in the layer's place, or None."""
    if isinstance(module, WeightStandardized):
        return "weight" if module.is_computed else None
    names = ("weight",) if isinstance(entry, ConvEntry) else ("weight", "bias")
    return next((name for name in names if name in vars(module)), None)


def _conv(module: nn.Module, entry: ConvEntry) -> ConvEntry | None:
    if out_channels(module) != entry.channels:
        return None
    if isinstance(module, WeightStandardized):
        return replace(entry, ws=WS(module.form), eps=float(module.ws_eps))
    if has_kernel(module):
        return replace(entry, action=Action.KEEP, reason="made plain after conversion", ws=None, eps=None)
    return None


def _norm(module: nn.Module, entry: NormEntry) -> NormEntry | None:
    then = module.then if isinstance(module, (GroupNormAct, ChannelScale, FrozenBatchNorm)) else ()
    if type(module) in (nn.GroupNorm, GroupNormAct, PositionNorm) and isinstance(module, nn.GroupNorm):
        if module.weight is None or module.bias is None or module.num_channels != entry.channels or then != entry.then:
            return None
        alone, stepped = isinstance(module, PositionNorm), takes_steps(module)
        had = (entry.action, entry.groups, entry.eps, entry.per_position, entry.stepped)
        if had == (Action.GROUP_NORM, module.num_groups, module.eps, alone, stepped):
            return entry
        affine, groups, eps = entry.affine or Affine.COPY, module.num_groups, float(module.eps)
        how: dict[str, Any] = {"groups": groups, "eps": eps, "per_position": alone, "stepped": stepped}
        changed = replace(entry, action=Action.GROUP_NORM, affine=affine, **how)
        return replace(changed, reason=f"{entry.reason}; changed after conversion", drift=None, drift_before=None)
    if type(module) is ChannelScale:
        fits = module.weight.numel() == entry.channels and then == entry.then
        return replace(entry, action=Action.SCALE, groups=None) if fits else None
    if type(module) is FrozenBatchNorm:
        fits = module.num_features == entry.channels and then == entry.then
        return replace(entry, action=Action.FREEZE, groups=None, affine=None, eps=module.eps) if fits else None
    if is_batch_norm(module) and type(module).__name__ == entry.kind:
        kept = replace(entry, action=Action.KEEP, groups=None, affine=None, drift=None, drift_before=None)
        return replace(kept, reason="put back after conversion", by_user=True)
    return None
