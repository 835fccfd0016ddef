"""Decide what happens to every norm and convolution, from a trace. Nothing is changed here."""

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from normswap.errors import described
from normswap.layers.convs import WeightStandardized, ws_class
from normswap.layers.standardization import EPS
from normswap.networks.inputs import describe
from normswap.networks.network import Network
from normswap.networks.probing import as_samples, departure, is_stepped
from normswap.networks.recognition import (
    NormParts,
    carried_modules,
    checked_parts,
    computed_tensors,
    has_kernel,
    is_batch_norm,
    is_registered_conv,
    is_registered_norm,
    misshapen,
    norm_parts,
    out_channels,
)
from normswap.planning.choices import WS, Action, Affine, Keep, Over, To
from normswap.planning.composites import choices
from normswap.planning.entry import ConvEntry, NormEntry
from normswap.planning.equalizing import equalize_norms
from normswap.planning.fitting import fit_norms
from normswap.planning.freshness import cannot_grow, first_not_initialized, is_fresh
from normswap.planning.groups import AUTO, num_groups_for
from normswap.planning.measuring import Images
from normswap.planning.moving_averages import moving_averages
from normswap.planning.options import Options
from normswap.planning.plan import Plan
from normswap.planning.plan_warnings import plan_warnings
from normswap.planning.schema import must_be_inputs
from normswap.texts import plain
from normswap.tracing.facts import LayerFacts, NormFacts, Trace
from normswap.tracing.graph import NAMED, Kind, Node
from normswap.tracing.operators import VIEWS

_ARITHMETIC = frozenset(["mul", "add", "sub", "div", "rsqrt", "sqrt", "reciprocal", "pow", "addcmul", "batch_norm"])

MORE = "<and others>"
"""Stands for the layers beyond the first few that feed or read one."""

ADAPTED = ", as a layer and its adapter do"
"""Ends the reason for which a convolution that may be merged with another stays plain, as merging takes it."""

STEPPED = "it takes steps and samples on two axes"
"""Why a norm of (T, N, C, *) values stays as it is where it would be frozen."""

FRESH = "its norm is fresh"
"""What allows the standard form to overwrite filters."""


Look = Callable[[Iterable[NormEntry]], Images]


def make_plan(network: Network, trace: Trace, options: Options, look: Look = lambda _: {}) -> Plan:
    """Return the plan for a network: one entry for every BatchNorm-like module and every convolution.

    Args:
        network: The network, unconverted.
        trace: What a forward pass of it showed.
        options: What the user asked for.
        look: Called with the norms' entries; returns what images show of their inputs, nothing where only
            filters tell.
    """
    known: dict[Hashable, str] = {}
    chosen = choices(network, trace, {name for name in network.norms if options.leaves(name)})
    norms = {
        name: _plan_norm(name, network, trace.norms.get(name), options, chosen.get(name, ""), known)
        for name in network.norms
    }
    trained = [name for name, norm in network.norms.items() if norm_parts(norm).is_trained]
    reads = _Reads(
        other=trace.first_reader(lambda node: node.kind not in (Kind.NORM, Kind.OTHER_NORM)),
        kept=trace.first_reader(lambda node: node.kind is Kind.NORM and not norms[node.name].converts),
        trained=trace.first_reader(lambda node: node.kind is Kind.NORM and node.name in trained),
        unsure=trace.first_reader(lambda node: node.kind is Kind.NORM and not is_fresh(network.norms[node.name])),
        apart=trace.first_reader(
            lambda node: (
                node.kind is Kind.OTHER_NORM
                or (node.kind is Kind.NORM and node.name in trained and not trace.norms[node.name].direct)
            )
        ),
    )
    sign = _sign_of_training(network, trained)
    convs = {
        name: _plan_conv(name, network, trace.convs.get(name), options, reads, sign)
        for name in network.modules
        if name in network.convs or name in trace.convs
    }
    options.must_apply(network.modules, norms, convs)
    convs = _in_the_form_of_copies(_share_fate_of_tied_weights(convs, network), network)
    norms = fit_norms(norms, options, network, convs, trained)
    norms, scales, advice = equalize_norms(network, trace, norms, convs, options, look(norms.values()))
    planned: dict[str, NormEntry | ConvEntry] = {**norms, **convs}
    entries = tuple(planned[name] for name in network.modules if name in planned)
    warnings = tuple(map(plain, (*plan_warnings(network, norms, trace), *_adapted(convs), *advice)))
    return Plan(options, entries, warnings, recorded(trace.inputs), scales, trace.made_up)


@dataclass(frozen=True)
class _Reads:
    """The first node that reads a convolution, by its name, and is one of four kinds.

    Attributes:
        other: No norm.
        kept: A norm that stays.
        trained: A trained norm.
        unsure: A norm that does not show whether it is trained.
        apart: A trained norm that reads something else than this layer's own output, or a norm of another kind.
    """

    other: Callable[[str], Node | None]
    kept: Callable[[str], Node | None]
    trained: Callable[[str], Node | None]
    unsure: Callable[[str], Node | None]
    apart: Callable[[str], Node | None]


def recorded(inputs: Any) -> Any:
    """Return inputs as data; None where a plan could not be read back with them."""
    spec = describe(inputs)
    try:
        must_be_inputs(spec)
    except ValueError:
        return None
    return spec


def _plan_norm(
    name: str, network: Network, facts: NormFacts | None, options: Options, chosen: str, known: dict[Hashable, str]
) -> NormEntry:
    norm, own = network.slots[name], options.for_layer(name)
    parts = checked_parts(name, norm)
    channels = parts.num_channels
    then, obstacle = _what_follows(name, norm, facts) if channels else ((), "it has no channels")
    obstacle = misshapen(parts) or obstacle
    shape = facts.shape if facts else None
    stepped = shape is not None and is_stepped(norm, shape)
    if shape is not None and stepped:
        shape = as_samples(shape)
    base = NormEntry(
        name,
        type(norm).__name__,
        Action.KEEP,
        "",
        network.aliases(name),
        channels,
        parts.eps,
        fed_by=_labels(facts.fed_by, facts.more) if facts else (),
        shape=shape,
        stepped=stepped,
        then=then,
    )
    if refusal := options.leaves(name):
        obstacle = obstacle or _departure(norm, then, facts, known)
        return _kept(replace(base, reason=refusal, by_user=True), norm, obstacle, options)
    obstacle = obstacle or chosen or _departure(norm, then, facts, known)
    read = "" if own.to is To.FROZEN else _read_elsewhere(facts)  # a frozen norm has the γ and β that it had
    if obstacle := obstacle or read or network.pinned_at(name):
        return replace(base, reason=obstacle)
    if own.to is To.FROZEN:
        return _frozen(base, norm)
    if facts is not None and facts.asked:
        what = f"code outside of it asks for its {facts.asked[0]}"
        return replace(base, reason=f"{what}, which would be another or missing")
    if options.affine is Affine.MATCH and parts.is_trained and (shared := _shared(parts, network)):
        return replace(base, reason=shared)
    per_position = own.over is Over.CHANNELS
    positions = 1 if per_position else math.prod(shape[2:]) if shape else None
    if channels * (positions or 2) < 2:
        if stepped:
            return replace(base, reason="sees one value per step of a sample, which any group would erase")
        return replace(base, action=Action.SCALE, reason="sees one value per sample, which any group would erase")
    counted = AUTO if own.groups == "auto" else own.groups
    groups = num_groups_for(channels, groups=counted, group_size=own.group_size, to=own.to, positions=positions)
    asked = _groups_asked(own, channels)
    reason = _norm_reason(facts, groups, asked)
    base = replace(base, action=Action.GROUP_NORM, reason=reason, groups_asked=asked, groups=groups)
    return replace(base, per_position=per_position)


def _kept(entry: NormEntry, norm: nn.Module, obstacle: str, options: Options) -> NormEntry:
    """Return the entry of a norm that the user keeps: frozen, where that is asked for and keeps what it computes."""
    if options.keep is Keep.LIVE or not isinstance(norm, _BatchNorm) or is_registered_norm(norm):
        return entry
    if norm_parts(norm).mean is None:
        obstacle = "it keeps no statistics"
    if entry.stepped:
        obstacle = STEPPED
    if obstacle:
        return replace(entry, reason=f"{entry.reason}; cannot be frozen: {obstacle}")
    return replace(entry, action=Action.FREEZE)


def _frozen(entry: NormEntry, norm: nn.Module) -> NormEntry:
    """Return the entry of a norm that is to keep its statistics, whatever the mode."""
    if is_registered_norm(norm):
        return replace(entry, reason="cannot be frozen: its class was taught, and only that knows how it goes on")
    if not isinstance(norm, _BatchNorm):
        return replace(entry, reason="its statistics are fixed already", by_user=True)
    if norm_parts(norm).mean is None:
        return replace(entry, reason="cannot be frozen: it keeps no statistics")
    if entry.stepped:
        return replace(entry, reason=f"cannot be frozen: {STEPPED}")
    return replace(entry, action=Action.FREEZE, reason="keeps its statistics and its function, as to='frozen' asks")


def _groups_asked(own: Options, channels: int) -> int | Literal["auto"]:
    if own.to is To.LAYER:
        return 1
    if own.to is To.INSTANCE:
        return channels
    return own.groups if own.group_size is None else max(channels // own.group_size, 1)


def _norm_reason(facts: NormFacts | None, groups: int, asked: int | str) -> str:
    if facts is None:
        return "never runs; replaced all the same"
    kinds = sorted({name or kind.value for kind, name in facts.kinds})
    via = "+".join(sorted(kind.value for kind in facts.via))
    one = "one " if len(facts.fed_by) == 1 and facts.fed_by[0].kind in NAMED else ""
    source = f"follows {one}{' and '.join(kinds) or 'constants'}"
    fewer = f"; {groups} of {asked} groups fit" if groups != asked and asked != "auto" else ""
    return f"{source}{f' through {via}' if via else ''}{fewer}"


def _what_follows(name: str, norm: nn.Module, facts: NormFacts | None) -> tuple[tuple[str, ...], str]:
    """Return the modules to carry over, or why the norm's own forward cannot be carried over."""
    steps = facts.steps if facts else ()
    called = [step.removeprefix("module:") for step in steps if step.startswith("module:")]
    prefix = f"{name}." if name else ""
    inside = {own for own, module in norm.named_modules() if own and any(map(is_batch_norm, module.modules()))}
    ran = tuple(child for step in called if (child := step.removeprefix(prefix)) not in inside)
    named = carried_modules(norm)
    if named is not None:
        forgotten = [child for child in ran if child not in named]
        what = f"its forward runs {forgotten[0]}, which its NormParts do not name; add it to then=" if forgotten else ""
        return tuple(named), what
    children = tuple(child for child, _ in norm.named_children() if child not in inside)
    if computed := computed_tensors(norm):
        return (), f"its {computed[0]} is computed (pruned or parametrized); make that permanent first"
    if not steps:
        return children, ""
    if unknown := [child for child in ran if child not in children]:
        return (), f"its forward runs {unknown[0]}, which is not a child of it"
    return ran, ""


def _shared(parts: NormParts, network: Network) -> str:
    """Return which affine value others hold, too: it cannot be what matches all of them."""
    for key, value in (("weight", parts.weight), ("bias", parts.bias)):
        if value is not None and network.owners[id(value)] > 1:
            return f"others hold its {key}, too, and a matched one is its own: give it a copy, or pass affine='copy'"
    return ""


def _read_elsewhere(facts: NormFacts | None) -> str:
    """Return what else in the network computes with a norm's γ or β, of which a replacement has other values."""
    found = ((key, operator) for key, operator in (facts.reads if facts else ()) if key in ("weight", "bias"))
    return next((f"its {key} is also read by {operator} outside of it" for key, operator in found), "")


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
    reads: "_Reads",
    sign: str,
) -> ConvEntry:
    conv = network.slots[name]
    feeds = _labels(facts.read_by, facts.more) if facts else ()
    aliases, channels = network.aliases(name), out_channels(conv)
    base = ConvEntry(name, type(conv).__name__, Action.KEEP, "", aliases, channels, feeds=feeds)
    wanted = options.for_layer(name).ws
    refusal = options.leaves(name) or ("weight standardization is off" if wanted is WS.NONE else "")
    if refusal:
        return replace(base, reason=refusal, by_user=True)
    if facts is None or (obstacle := _conv_obstacle(name, conv, facts, reads) or network.pinned_at(name)):
        standardized = isinstance(conv, WeightStandardized)
        unreached = "weight-standardized already" if standardized else "no forward pass reaches it"
        return replace(base, reason=unreached if facts is None else obstacle)
    frozen = not conv._parameters["weight"].requires_grad  # type: ignore[union-attr]
    training = _training_shown(name, reads, sign)
    adaptive = wanted is WS.ADAPTIVE or (wanted is WS.AUTO and (training != FRESH or frozen))
    if frozen and not adaptive:
        return replace(base, reason="its weight is frozen: the standard form would change a filter that is fixed")
    reason = training
    apart = reads.apart(name) if not adaptive and options.affine is Affine.MATCH else None
    if apart is not None and apart.kind is Kind.NORM:
        adaptive = True
        reason = f"what {apart.name} meets behind the standard form is not known, for it reads more than this output"
    elif apart is not None and not training.startswith(FRESH):
        adaptive = True
        reason = f"<{apart.name}> would see that the standard form scales each filter"
    if via := "+".join(sorted(kind.value for kind in facts.via)):
        reason = f"every path ends in a norm, through {via}; {reason}"
    form = WS.ADAPTIVE if adaptive else WS.STANDARD
    return replace(base, action=Action.STANDARDIZE, reason=reason, ws=form, eps=EPS)


def _training_shown(name: str, reads: "_Reads", sign: str) -> str:
    """Return what the norms behind a convolution, and else the network, show of training."""
    if reads.trained(name):
        return "its norm is trained"
    if reads.unsure(name):
        return "its norm does not show whether it is trained"
    return f"{FRESH}, {sign}" if sign else FRESH


def _sign_of_training(network: Network, norms: Iterable[str]) -> str:
    """Return the first that is trained, in words: a norm, and where there is none a layer whose filters are.

    A network of which a part is trained may be trained altogether, and the adaptive form loses nothing.
    """
    for name in norms:
        return f"{name} is trained"
    first = first_not_initialized({name: conv for name, conv in network.convs.items() if has_kernel(conv)})
    return "" if first is None else f"the filters of {first} are not"


def _adapted(convs: Mapping[str, ConvEntry]) -> Iterator[str]:
    """Yield what to do about adapters, where there are some."""
    if names := [name for name, entry in convs.items() if entry.reason.endswith(ADAPTED)]:
        yield (
            f"{len(names)} convolutions belong to layers with adapters ({names[0]}, …) and stay plain, so that merging "
            "keeps the function; to standardize them merge the adapters before converting, or add them afterwards"
        )


def _conv_obstacle(name: str, conv: nn.Module, facts: LayerFacts, reads: "_Reads") -> str:
    """Return why a convolution must stay as it is, or nothing."""
    if isinstance(conv, WeightStandardized):
        return "weight-standardized already"
    if not has_kernel(conv) or not (facts.plain or is_registered_conv(conv)):
        return "its kernel is computed in the forward pass, or read outside its own"
    if facts.weight_reads:
        return f"its weight is also read by {sorted(facts.weight_reads)[0]}"
    if facts.beside:
        return f"adds up over one input with {facts.beside}{ADAPTED}"
    if facts.leaves:
        return "its output leaves the network"
    if other := reads.other(name):
        return f"its output is read by {_label(other.kind, other.name) or 'the code of the network itself'}"
    if kept := reads.kept(name):
        return f"its output is read by {kept.name}, which is left as it is"
    if not any(kind is Kind.NORM for kind, _ in facts.kinds):
        return "no norm that is replaced reads its output"
    if conv._parameters["weight"].numel() == out_channels(conv):  # type: ignore[union-attr]
        return "one weight per filter (fan-in 1): standardizing would erase it"
    if cannot_grow(conv, added=Kind.ADD in facts.via):
        return "its filters are zero or constant: standardized they could not grow"
    try:
        ws_class(type(conv))
    except Exception as error:  # whatever its own __init_subclass__ does
        return f"its class cannot be subclassed ({described(error)})"
    return ""


def _share_fate_of_tied_weights(convs: Mapping[str, ConvEntry], network: Network) -> dict[str, ConvEntry]:
    """Standardize modules that share one weight only together, in one form, and only where nothing else holds it."""
    tied = dict(convs)
    for names in network.holders_of_kernels(convs):
        others = [other for other in names if other not in convs or not convs[other].changes]
        layouts = {
            (type(network.slots[name]), getattr(network.slots[name], "groups", 1)) for name in names if not others
        }
        forms = {convs[name].ws for name in names if name in convs and convs[name].changes}
        for name in names:
            entry = tied.get(name)
            if entry is None or not entry.changes:
                continue
            if others:
                left = "which is left as it is" if others[0] in convs else "which is no convolution that is replaced"
                reason = f"shares its weight with {others[0]}, {left}"
                tied[name] = replace(entry, action=Action.KEEP, reason=reason, ws=None, eps=None)
            elif len(layouts) > 1:
                other = next(other for other in names if other != name)
                reason = f"shares its weight with {other}, to which other values are a filter"
                tied[name] = replace(entry, action=Action.KEEP, reason=reason, ws=None, eps=None)
            elif len(forms) > 1:
                tied[name] = replace(entry, ws=WS.ADAPTIVE, reason=f"{entry.reason}; shares its weight")
    return tied


def _in_the_form_of_copies(convs: Mapping[str, ConvEntry], network: Network) -> dict[str, ConvEntry]:
    """Give a layer and the one that its filters are averaged into one form: the adaptive, where one has that."""
    agreed = dict(convs)
    changed = {name: network.slots[name] for name, entry in convs.items() if entry.changes}
    for name, other in moving_averages(changed).items():
        if convs[name].ws is WS.STANDARD and convs[other].ws is WS.ADAPTIVE:
            reason = f"{other} holds nearly the same filters, as a moving average does, and its own are fixed"
            agreed[name] = replace(convs[name], ws=WS.ADAPTIVE, reason=reason)
    return agreed


def _labels(nodes: Iterable[Node], more: bool) -> tuple[str, ...]:
    return tuple(_label(node.kind, node.name) for node in nodes) + ((MORE,) if more else ())


def _label(kind: Kind, name: str) -> str:
    return name if kind in NAMED else f"<{name}>"
