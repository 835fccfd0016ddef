"""Decide what happens to every norm and convolution, from a trace. Nothing is changed here."""

import math
from dataclasses import replace
from fnmatch import fnmatchcase
from types import MappingProxyType

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from normswap.layers.convs import WeightStandardized
from normswap.layers.standardization import EPS
from normswap.networks.copying import module_names
from normswap.networks.inputs import describe
from normswap.networks.recognition import (
    computed_tensors,
    has_kernel,
    is_batch_norm,
    is_conv,
    is_registered_conv,
    norm_parts,
    out_channels,
)
from normswap.planning.fitting import Measured, fit_norms, is_trained
from normswap.planning.groups import num_groups_for
from normswap.planning.options import Options
from normswap.planning.plan import Action, Entry, Plan
from normswap.planning.plan_warnings import cautions
from normswap.tracing.forward import ConvFacts, NormFacts, Trace
from normswap.tracing.graph import Kind
from normswap.tracing.operators import VIEWS

_ARITHMETIC = frozenset(["mul", "add", "sub", "div", "rsqrt", "sqrt", "reciprocal", "pow", "addcmul", "batch_norm"])


AUTO = 32
"""Largest group count that ``groups="auto"`` gives a norm without statistics to choose by."""

NAMED = (Kind.CONV, Kind.LINEAR, Kind.NORM)
"""Kinds of nodes that carry a layer's name; others carry an operator's."""


def make_plan(model: nn.Module, trace: Trace, options: Options, measured: Measured = MappingProxyType({})) -> Plan:
    """Return the plan for `model`: one entry for every BatchNorm-like module and every convolution.

    Args:
        model: The network, unconverted.
        trace: What a forward pass of it showed.
        options: What the user asked for.
        measured: Drift by norm and group count, where images told; else it is estimated from the running statistics.
    """
    names = module_names(model)
    modules = {found[0]: module for module in model.modules() for found in [names[id(module)]]}
    norms = {
        name: _plan_norm(name, tuple(names[id(m)][1:]), m, trace.norms.get(name), options)
        for name, m in modules.items()
        if is_batch_norm(m)
    }
    trained = {name for name in norms if is_trained(modules[name])}
    convs = {
        name: _plan_conv(name, tuple(names[id(m)][1:]), m, trace.convs.get(name), options, norms, trained)
        for name, m in modules.items()
        if is_conv(m) or isinstance(m, WeightStandardized) or name in trace.convs
    }
    convs = _share_fate_of_tied_weights(convs, modules)
    norms = fit_norms(norms, options, modules, convs, measured)
    planned = norms | convs
    entries = tuple(planned[name] for name in modules if name in planned)
    return Plan(options, entries, tuple(cautions(model, modules, norms, trace, options)), describe(trace.inputs))


def _plan_norm(
    name: str, aliases: tuple[str, ...], norm: nn.Module, facts: NormFacts | None, options: Options
) -> Entry:
    parts = norm_parts(norm)
    channels = parts.num_channels
    then, obstacle = (tuple(parts.then), "") if parts.then is not None else _what_follows(name, norm, facts)
    base = Entry(
        name, type(norm).__name__, "norm", Action.KEEP, "", aliases,
        fed_by=tuple(_label(node.kind, node.name) for node in facts.fed_by) if facts else (),
        channels=channels, shape=facts.shape if facts else None, eps=parts.eps, then=then,
    )  # fmt: skip
    positions, own = math.prod(facts.shape[2:]) if facts else None, options.for_layer(name)
    if refusal := _left_by_user(name, options):
        return replace(base, reason=refusal, by_user=True)
    if obstacle:
        return replace(base, reason=obstacle)
    if channels * (positions or 2) < 2:
        return replace(base, action=Action.SCALE, reason="sees one value a sample, which any group would erase")
    counted = AUTO if own.groups == "auto" else int(own.groups)
    groups = num_groups_for(channels, groups=counted, group_size=own.group_size, to=own.to, positions=positions)
    asked = {"layer": 1, "instance": channels}.get(own.to) or (
        own.groups if own.group_size is None else max(channels // own.group_size, 1)
    )
    return replace(
        base, action=Action.GROUP_NORM, reason=_norm_reason(facts, groups, asked), groups_asked=asked, groups=groups
    )


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
    """Return the child modules to carry over, or why the norm's own forward cannot be carried over."""
    children = tuple(child for child, _ in norm.named_children())
    if computed := computed_tensors(norm):
        return (), f"its {computed[0]} is computed (pruned or parametrized); make that permanent first"
    if facts is None or not facts.steps:
        return children, ""
    called = [step.removeprefix("module:") for step in facts.steps if step.startswith("module:")]
    followed = tuple(child.removeprefix(f"{name}." if name else "") for child in called)
    if unknown := [child for child in followed if child not in children]:
        return (), f"its forward runs {unknown[0]}, which is not a child of it"
    harmless = VIEWS | ({"batch_norm"} if isinstance(norm, _BatchNorm) else _ARITHMETIC)
    if extra := [step for step in facts.steps if not step.startswith("module:") and step not in harmless]:
        return (), f"its forward also computes {extra[0]}, which GroupNorm would lose"
    first = next((i for i, step in enumerate(facts.steps) if step.startswith("module:")), len(facts.steps))
    if any(step not in VIEWS for step in facts.steps[first:] if not step.startswith("module:")):
        return (), f"its forward runs {followed[0]} before it normalizes"
    return followed, ""


def _plan_conv(
    name: str,
    aliases: tuple[str, ...],
    conv: nn.Module,
    facts: ConvFacts | None,
    options: Options,
    norms: dict[str, Entry],
    trained: set[str],
) -> Entry:
    feeds = tuple(_label(node.kind, node.name) for node in facts.read_by) if facts else ()
    base = Entry(name, type(conv).__name__, "conv", Action.KEEP, "", aliases, feeds=feeds, channels=out_channels(conv))
    wanted = options.for_layer(name).ws
    if refusal := _left_by_user(name, options) or ("weight standardization is off" if wanted == "none" else ""):
        return replace(base, reason=refusal, by_user=True)
    if obstacle := _conv_obstacle(conv, facts, norms):
        return replace(base, reason=obstacle)
    assert facts is not None
    ends = {node.name for node in facts.read_by if node.kind is Kind.NORM}
    frozen = not conv._parameters["weight"].requires_grad  # type: ignore[union-attr]
    form = wanted if wanted != "auto" else "adaptive" if ends & trained or frozen else "standard"
    if form == "standard" and frozen:
        return replace(base, reason="its weight is frozen: the standard form would change a filter that is fixed")
    via = "+".join(sorted(kind.value for kind in facts.via))
    reason = "its norm is trained" if ends & trained else "its norm is fresh"
    if via:
        reason = f"every path ends in a norm, through {via}; {reason}"
    return replace(base, action=Action.STANDARDIZE, reason=reason, ws=form, eps=EPS)


def _conv_obstacle(conv: nn.Module, facts: ConvFacts | None, norms: dict[str, Entry]) -> str:
    """Return why a convolution must stay as it is, or nothing."""
    if isinstance(conv, WeightStandardized):
        return "weight-standardized already"
    if facts is None:
        return "no forward pass reaches it"
    if not has_kernel(conv) or not (facts.plain or is_registered_conv(conv)):
        return "its kernel is computed in the forward pass, or read outside its own"
    if facts.weight_reads:
        return f"its weight is also read by {sorted(facts.weight_reads)[0]}"
    if facts.leaves:
        return "its output leaves the network"
    replaced = [node for node in facts.read_by if node.kind is Kind.NORM and norms[node.name].changes]
    if other := [n for n in facts.read_by if n.kind not in (Kind.NORM, Kind.OTHER_NORM)]:
        return f"its output is read by {_label(other[0].kind, other[0].name)}"
    if kept := [n for n in facts.read_by if n.kind is Kind.NORM and not norms[n.name].changes]:
        return f"its output is read by {kept[0].name}, which is left as it is"
    if not replaced:
        return "no norm that is replaced reads its output"
    if conv._parameters["weight"].numel() == out_channels(conv):  # type: ignore[union-attr]
        return "one weight a filter (fan-in 1): standardizing would erase it"
    return ""


def _share_fate_of_tied_weights(convs: dict[str, Entry], modules: dict[str, nn.Module]) -> dict[str, Entry]:
    """Standardize modules that share one weight only together."""
    owners: dict[int, list[str]] = {}
    for name in convs:
        weight = modules[name]._parameters.get("weight")
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


def _left_by_user(name: str, options: Options) -> str:
    if options.include and not any(fnmatchcase(name, pattern) for pattern in options.include):
        return "no include pattern matches"
    excluded = next((pattern for pattern in options.exclude if fnmatchcase(name, pattern)), None)
    return f"excluded by {excluded!r}" if excluded else ""


def _label(kind: Kind, name: str) -> str:
    return name if kind in NAMED else f"<{name}>"
