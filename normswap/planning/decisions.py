"""Decide what happens to every norm and convolution, from a trace. Nothing is changed here."""

import math
from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any, Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from normswap.errors import described
from normswap.layers.convs import WeightStandardized, ws_class
from normswap.layers.standardization import EPS
from normswap.networks.inputs import describe
from normswap.networks.network import Network
from normswap.networks.probing import departure
from normswap.networks.recognition import (
    carried_modules,
    checked_parts,
    computed_tensors,
    has_kernel,
    is_registered_conv,
    is_registered_norm,
    norm_parts,
    out_channels,
)
from normswap.planning.choices import WS, Action, To
from normswap.planning.entry import ConvEntry, NormEntry
from normswap.planning.equalizing import Scales, equalize_norms
from normswap.planning.fitting import fit_norms
from normswap.planning.groups import num_groups_for
from normswap.planning.measuring import Images
from normswap.planning.options import Options
from normswap.planning.plan import Plan
from normswap.planning.plan_warnings import plan_warnings
from normswap.planning.schema import must_be_inputs
from normswap.tracing.facts import LayerFacts, NormFacts, Trace
from normswap.tracing.graph import Kind
from normswap.tracing.operators import VIEWS

_ARITHMETIC = frozenset(["mul", "add", "sub", "div", "rsqrt", "sqrt", "reciprocal", "pow", "addcmul", "batch_norm"])

AUTO = 32
"""Largest group count that ``groups="auto"`` gives a norm without statistics to choose by."""

NAMED = (Kind.CONV, Kind.LINEAR, Kind.NORM)
"""Kinds of nodes that carry a layer's name; others carry an operator's."""


def make_plan(network: Network, trace: Trace, options: Options, images: Images | None = None) -> Plan:
    """Return the plan for a network: one entry for every BatchNorm-like module and every convolution.

    Args:
        network: The network, unconverted.
        trace: What a forward pass of it showed.
        options: What the user asked for.
        images: What images showed of the norms' inputs; empty to choose signs by the filters, None to leave them.
    """
    known: dict[Hashable, str] = {}
    norms = {name: _plan_norm(name, network, trace.norms.get(name), options, known) for name in network.norms}
    trained = {name for name, norm in network.norms.items() if norm_parts(norm).is_trained}
    convs = {
        name: _plan_conv(name, network, trace.convs.get(name), options, norms, trained)
        for name in network.modules
        if name in network.convs or name in trace.convs
    }
    convs = _share_fate_of_tied_weights(convs, network)
    norms = fit_norms(norms, options, network, convs, trained)
    scales: Scales = {}
    if images is not None:
        norms, scales = equalize_norms(network, trace, norms, convs, options, images)
    planned: dict[str, NormEntry | ConvEntry] = {**norms, **convs}
    entries = tuple(planned[name] for name in network.modules if name in planned)
    warnings = tuple(plan_warnings(network, norms, trace, options))
    return Plan(options, entries, warnings, _recorded(trace.inputs), scales)


def _recorded(inputs: Any) -> Any:
    """Return inputs as data; None where a plan could not be read back with them."""
    spec = describe(inputs)
    try:
        must_be_inputs(spec)
    except ValueError:
        return None
    return spec


def _plan_norm(
    name: str, network: Network, facts: NormFacts | None, options: Options, known: dict[Hashable, str]
) -> NormEntry:
    norm, own = network.slots[name], options.for_layer(name)
    parts = checked_parts(name, norm)
    channels = parts.num_channels
    then, obstacle = _what_follows(name, norm, facts) if channels else ((), "it has no channels")
    base = NormEntry(
        name,
        type(norm).__name__,
        Action.KEEP,
        "",
        network.aliases(name),
        channels,
        parts.eps,
        fed_by=tuple(_label(node.kind, node.name) for node in facts.fed_by) if facts else (),
        shape=facts.shape if facts else None,
        then=then,
    )
    if refusal := options.leaves(name):
        return replace(base, reason=refusal, by_user=True)
    if obstacle := obstacle or _departure(norm, then, facts, known):
        return replace(base, reason=obstacle)
    positions = math.prod(facts.shape[2:]) if facts else None
    if channels * (positions or 2) < 2:
        return replace(base, action=Action.SCALE, reason="sees one value per sample, which any group would erase")
    counted = AUTO if own.groups == "auto" else own.groups
    groups = num_groups_for(channels, groups=counted, group_size=own.group_size, to=own.to, positions=positions)
    asked = _groups_asked(own, channels)
    reason = _norm_reason(facts, groups, asked)
    return replace(base, action=Action.GROUP_NORM, reason=reason, groups_asked=asked, groups=groups)


def _groups_asked(own: Options, channels: int) -> int | Literal["auto"]:
    if own.to is To.LAYER:
        return 1
    if own.to is To.INSTANCE:
        return channels
    return own.groups if own.group_size is None else max(channels // own.group_size, 1)


def _norm_reason(facts: NormFacts | None, groups: int, asked: int | str) -> str:
    if facts is None:
        return "never runs; replaced all the same"
    kinds = sorted({node.kind.value if node.kind in NAMED else node.name for node in facts.fed_by})
    via = "+".join(sorted(kind.value for kind in facts.via))
    one = "one " if len(facts.fed_by) == 1 and facts.fed_by[0].kind in NAMED else ""
    source = f"follows {one}{' and '.join(kinds) or 'constants'}"
    fewer = f"; {groups} of {asked} groups fit" if groups != asked and asked != "auto" else ""
    return f"{source}{f' through {via}' if via else ''}{fewer}"


def _what_follows(name: str, norm: nn.Module, facts: NormFacts | None) -> tuple[tuple[str, ...], str]:
    """Return the modules to carry over, or why the norm's own forward cannot be carried over."""
    steps = facts.steps if facts else ()
    called = [step.removeprefix("module:") for step in steps if step.startswith("module:")]
    ran = tuple(child.removeprefix(f"{name}." if name else "") for child in called)
    named = carried_modules(norm)
    if named is not None:
        forgotten = [child for child in ran if child not in named]
        what = f"its forward runs {forgotten[0]}, which its NormParts do not name; add it to then=" if forgotten else ""
        return tuple(named), what
    children = tuple(child for child, _ in norm.named_children())
    if computed := computed_tensors(norm):
        return (), f"its {computed[0]} is computed (pruned or parametrized); make that permanent first"
    if not steps:
        return children, ""
    if unknown := [child for child in ran if child not in children]:
        return (), f"its forward runs {unknown[0]}, which is not a child of it"
    return ran, ""


def _departure(norm: nn.Module, then: tuple[str, ...], facts: NormFacts | None, known: dict[Hashable, str]) -> str:
    """Return why a norm that was run by itself is not what GroupNorm replaces, by what the trace knows of its forward.

    Numbers decide; operators only tell people where a difference comes from.
    """
    found = departure(norm, then, facts.shape if facts else None, known)
    if not found.startswith("in eval mode its output is") or is_registered_norm(norm):
        return found
    steps = facts.steps if facts else ()
    harmless = VIEWS | ({"batch_norm"} if isinstance(norm, _BatchNorm) else _ARITHMETIC)
    if extra := [step for step in steps if not step.startswith("module:") and step not in harmless]:
        return f"its forward also computes {extra[0]}, which GroupNorm would lose"
    first = next((i for i, step in enumerate(steps) if step.startswith("module:")), len(steps))
    if any(step not in VIEWS for step in steps[first:] if not step.startswith("module:")):
        return f"its forward runs {then[0]} before it normalizes"
    return found


def _plan_conv(
    name: str,
    network: Network,
    facts: LayerFacts | None,
    options: Options,
    norms: Mapping[str, NormEntry],
    trained: set[str],
) -> ConvEntry:
    conv = network.slots[name]
    feeds = tuple(_label(node.kind, node.name) for node in facts.read_by) if facts else ()
    aliases, channels = network.aliases(name), out_channels(conv)
    base = ConvEntry(name, type(conv).__name__, Action.KEEP, "", aliases, channels, feeds=feeds)
    wanted = options.for_layer(name).ws
    refusal = options.leaves(name) or ("weight standardization is off" if wanted is WS.NONE else "")
    if refusal:
        return replace(base, reason=refusal, by_user=True)
    if facts is None or (obstacle := _conv_obstacle(conv, facts, norms)):
        standardized = isinstance(conv, WeightStandardized)
        unreached = "weight-standardized already" if standardized else "no forward pass reaches it"
        return replace(base, reason=unreached if facts is None else obstacle)
    ends = {node.name for node in facts.read_by if node.kind is Kind.NORM}
    frozen = not conv._parameters["weight"].requires_grad  # type: ignore[union-attr]
    adaptive = wanted is WS.ADAPTIVE or (wanted is WS.AUTO and (ends & trained or frozen))
    if frozen and not adaptive:
        return replace(base, reason="its weight is frozen: the standard form would change a filter that is fixed")
    reason = "its norm is trained" if ends & trained else "its norm is fresh"
    if via := "+".join(sorted(kind.value for kind in facts.via)):
        reason = f"every path ends in a norm, through {via}; {reason}"
    form = WS.ADAPTIVE if adaptive else WS.STANDARD
    return replace(base, action=Action.STANDARDIZE, reason=reason, ws=form, eps=EPS)


def _conv_obstacle(conv: nn.Module, facts: LayerFacts, norms: Mapping[str, NormEntry]) -> str:
    """Return why a convolution must stay as it is, or nothing."""
    if isinstance(conv, WeightStandardized):
        return "weight-standardized already"
    if not has_kernel(conv) or not (facts.plain or is_registered_conv(conv)):
        return "its kernel is computed in the forward pass, or read outside its own"
    if facts.weight_reads:
        return f"its weight is also read by {sorted(facts.weight_reads)[0]}"
    if facts.leaves:
        return "its output leaves the network"
    ends = [node for node in facts.read_by if node.kind is Kind.NORM]
    if other := [n for n in facts.read_by if n.kind not in (Kind.NORM, Kind.OTHER_NORM)]:
        return f"its output is read by {_label(other[0].kind, other[0].name)}"
    if kept := [node for node in ends if not norms[node.name].changes]:
        return f"its output is read by {kept[0].name}, which is left as it is"
    if not ends:
        return "no norm that is replaced reads its output"
    if conv._parameters["weight"].numel() == out_channels(conv):  # type: ignore[union-attr]
        return "one weight per filter (fan-in 1): standardizing would erase it"
    try:
        ws_class(type(conv))
    except Exception as error:  # whatever its own __init_subclass__ does
        return f"its class cannot be subclassed ({described(error)})"
    return ""


def _share_fate_of_tied_weights(convs: Mapping[str, ConvEntry], network: Network) -> dict[str, ConvEntry]:
    """Standardize modules that share one weight only together."""
    owners: dict[int, list[str]] = {}
    for name in convs:
        weight = network.slots[name]._parameters.get("weight")
        if weight is not None:
            owners.setdefault(id(weight), []).append(name)
    tied = dict(convs)
    for names in owners.values():
        kept = [name for name in names if not convs[name].changes]
        for name in names if kept else ():
            if convs[name].changes:
                reason = f"shares its weight with {kept[0]}, which is left as it is"
                tied[name] = replace(convs[name], action=Action.KEEP, reason=reason, ws=None, eps=None)
    return tied


def _label(kind: Kind, name: str) -> str:
    return name if kind in NAMED else f"<{name}>"
