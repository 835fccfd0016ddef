"""Norms for one place: modules that hold several BatchNorms and choose between them, by mode, domain or width."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from normswap.networks.network import Network
from normswap.networks.recognition import norm_parts
from normswap.tracing.facts import Trace
from normswap.tracing.graph import Kind
from normswap.tracing.modes import words

_CONTAINERS = (nn.ModuleList, nn.ModuleDict)

_MAKES_NAMES_UP = ("getattr", "_modules", "get_submodule")
"""Names in code that reaches parts by names that it makes up."""


@dataclass(frozen=True)
class _Branch:
    """A part of a module that holds norms, and of parameters and convolutions nothing else.

    Attributes:
        name: Its name.
        container: Name of the list or dict that holds it, by which code chooses; empty where it is an attribute.
        norms: Names of its norms.
        channels: Their channels.
    """

    name: str
    container: str
    norms: frozenset[str]
    channels: frozenset[int]


def choices(network: Network, trace: Trace, left: Collection[str] = ()) -> dict[str, str]:
    """Return, for norms that a module chooses between, why none of them can be replaced alone.

    A module chooses where of several norms that it holds side by side the pass ran a part: of those in one list or
    dict, or of those of one size. In a module that holds other layers, too, its code must speak of a norm that did not
    run, and such norms must outnumber the other layers that did not: a head that is switched off brings its own. It
    chooses by mode where one norm runs in eval mode alone and another in train mode alone.

    Args:
        network: The network, unconverted.
        trace: What forward passes showed.
        left: Names of norms that the user leaves alone; that one of them did not run is known.
    """
    never = network.norms.keys() - trace.norms.keys() - set(left)
    passes = [{node.name for node in graph.nodes if node.kind is Kind.NORM} for graph in trace.graphs]
    alone = (passes[0] - passes[1], passes[1] - passes[0]) if len(passes) == 2 else (set[str](), set[str]())
    reasons: dict[str, str] = {}
    if not never and not all(alone):
        return reasons
    norms = {id(norm): name for name, norm in network.norms.items()}
    holders = ((name, module) for name, module in network.modules.items() if not isinstance(module, _CONTAINERS))
    for name, holder in holders:
        branches = list(_branches(norms, name, holder))
        idle = {branch.name for branch in branches if branch.norms <= never}
        beside = _for_one_place(name, holder, branches, norms, idle, trace.shapes)
        for found, why in (*_by_chance(beside, never), *_by_mode(branches, *alone)):
            where = f"{name} ({type(holder).__name__})" if name else "the network"
            alone_there = name and _is_nothing_else(holder, norms)
            advice = f"put the one in use in the place of {name}" if alone_there else "hold the one in use alone"
            for norm in (norm for branch in found for norm in branch.norms):
                reasons[norm] = f"one of {len(found)} norms between which {where} chooses ({why}): {advice}"
    return reasons


def _is_nothing_else(holder: nn.Module, norms: Mapping[int, str]) -> bool:
    """Tell whether a module holds norms, a gain and an offset of its own at most, and no other layers."""
    theirs = {id(p) for module in holder.modules() if id(module) in norms for p in module.parameters()}
    own = {id(p) for p in holder.parameters(recurse=False) if p.ndim <= 1}
    return all(id(p) in theirs | own for p in holder.parameters())


def _for_one_place(
    name: str,
    holder: nn.Module,
    branches: list[_Branch],
    norms: Mapping[int, str],
    idle: set[str],
    ran: Collection[str],
) -> list[_Branch]:
    """Return the branches of a module of which it may run one in place of another."""
    own = {branch.name for branch in branches if not branch.container}
    if not own or _is_nothing_else(holder, norms):
        return branches
    spoken = [branch for branch in branches if branch.name in own & idle and _speaks_of(type(holder), branch.name)]
    if not spoken:
        return [branch for branch in branches if branch.container]
    others = (f"{name}.{key}".lstrip(".") for key, part in holder._modules.items() if part and list(part.parameters()))
    off = [other for other in others if other not in own and not any(f"{key}.".startswith(f"{other}.") for key in ran)]
    return [branch for branch in branches if branch.container or len(spoken) > len(off)]


def _speaks_of(kind: Any, name: str) -> bool:
    """Tell whether the code that a module's forward runs names a part of it, or makes names up."""
    return not words(kind).isdisjoint((name.rpartition(".")[2], *_MAKES_NAMES_UP))


def _by_chance(branches: list[_Branch], never: Collection[str]) -> Iterator[tuple[list[_Branch], str]]:
    """Yield branches side by side of which some ran and others did not, and what tells so."""
    for key in dict.fromkeys(branch.container or branch.channels for branch in branches):
        beside = [branch for branch in branches if (branch.container or branch.channels) == key]
        idle = [branch for branch in beside if branch.norms <= set(never)]
        if idle and len(idle) < len(beside):
            yield beside, f"{idle[0].name} did not run"


def _by_mode(branches: list[_Branch], tested: set[str], trained: set[str]) -> Iterator[tuple[list[_Branch], str]]:
    """Yield branches of which some run in eval mode alone and others in train mode alone, and what tells so."""
    only = [branch for branch in branches if branch.norms <= tested]
    others = [branch for branch in branches if branch.norms <= trained]
    if only and others:
        yield [*only, *others], f"{only[0].name} runs in eval mode and {others[0].name} in train mode"


def _branches(norms: Mapping[int, str], name: str, holder: nn.Module) -> Iterator[_Branch]:
    for key, child in holder._modules.items():
        where = f"{name}.{key}".lstrip(".")
        if isinstance(child, _CONTAINERS):
            yield from _members(norms, where, child)
        elif child is not None and (branch := _branch(norms, where, "", child)):
            yield branch


def _members(norms: Mapping[int, str], name: str, container: nn.Module) -> Iterator[_Branch]:
    for key, child in container._modules.items():
        if child is not None and (branch := _branch(norms, f"{name}.{key}", name, child)):
            yield branch


def _branch(norms: Mapping[int, str], name: str, container: str, module: nn.Module) -> _Branch | None:
    found = {id(inner): inner for inner in module.modules() if id(inner) in norms}
    theirs = {id(p) for norm in found.values() for p in norm.parameters()}
    if not found or any(id(p) not in theirs for p in module.parameters()):
        return None
    channels = frozenset(norm_parts(norm).num_channels for norm in found.values())
    return _Branch(name, container, frozenset(map(norms.__getitem__, found)), channels)
