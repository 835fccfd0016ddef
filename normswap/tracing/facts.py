"""What a forward pass showed: for each norm what feeds it, for each convolution what reads it."""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, reduce
from operator import or_
from typing import Any

from normswap.networks.inputs import Samples, samples_in
from normswap.tracing.graph import FEW, LAYERS, NAMED, Graph, Kind, Node, Reach, Select, Slices
from normswap.tracing.recorder import Recorder, Shapes

OWN_READS = {
    Kind.CONV: frozenset(("convolution", "torchvision::deform_conv2d")),
    Kind.LINEAR: frozenset("t addmm mm linear".split()),
}
"""Operators by which a convolution or a linear layer reads its own weight."""


@dataclass(frozen=True)
class Slice:
    """Neighbouring channels of a norm's input.

    Attributes:
        layer: The convolution or linear layer of which they are the very output; empty where they are none's.
        channels: How many.
    """

    layer: str
    channels: int


@dataclass(frozen=True)
class NormFacts:
    """What one BatchNorm-like module sees, over all its calls.

    Attributes:
        shape: (N, C, *) shape of its smallest input.
        fed_by: The first nodes upstream that change values.
        more: Whether others feed it, too, than the first few.
        kinds: What all of them are: kinds, with the operator's name where a node has no layer's.
        via: Kinds of nodes between those and the norm.
        steps: The operators and modules that its forward runs.
        direct: Whether its input is, in every call, the very tensor that the one node feeding it made.
        slices: What its channels are, where its input is, in every call, the very output of the same layer, or the same
            concatenation along the channels; else nothing.
        reads: Operators outside of it that read its own parameters and buffers, by the tensor's name.
        asked: Attributes that code outside of it asked it for, of which its replacement has others or none.
    """

    shape: tuple[int, ...]
    fed_by: tuple[Node, ...]
    more: bool
    kinds: frozenset[tuple[Kind, str]]
    via: frozenset[Kind]
    steps: tuple[str, ...]
    direct: bool = False
    slices: tuple[Slice, ...] = ()
    reads: tuple[tuple[str, str], ...] = ()
    asked: tuple[str, ...] = ()

    def merged(self, other: "NormFacts") -> "NormFacts":
        """Return this with what another pass adds: who else feeds and reads it, and a smaller input to fit."""
        fed_by = _distinct([*self.fed_by, *other.fed_by])
        return replace(
            self,
            shape=min(self.shape, other.shape, key=_positions),
            fed_by=fed_by[:FEW],
            more=self.more or other.more or len(fed_by) > FEW,
            kinds=self.kinds | other.kinds,
            via=self.via | other.via,
            direct=self.direct and other.direct and len(fed_by) == 1,
            slices=self.slices if self.slices == other.slices else (),
            reads=tuple(sorted({*self.reads, *other.reads})),
        ).asked_for(other.asked)

    def asked_for(self, more: Iterable[str]) -> "NormFacts":
        """Return this with other attributes that it was asked for."""
        return replace(self, asked=tuple(sorted({*self.asked, *more})))


@dataclass(frozen=True)
class LayerFacts:
    """What happens to the output of one weight of a convolution or a linear layer, over all its calls.

    Attributes:
        plain: Whether the operator read the parameter itself and not something computed from it.
        read_by: The first nodes downstream that change values.
        more: Whether others read it, too, than the first few.
        kinds: What all of them are.
        via: Kinds of nodes between the convolution and those.
        leaves: Whether the output leaves the network.
        weight_reads: Other operators that read the weight.
        norms: The norms that read it, itself or in a concatenation along the channels; None where others do, too.
        beside: A convolution that updates its kernel, or the one that it updates (`Graph.updates`); else empty.
        bias_reads: Other operators that read the bias.
    """

    plain: bool
    read_by: tuple[Node, ...]
    more: bool
    kinds: frozenset[tuple[Kind, str]]
    via: frozenset[Kind]
    leaves: bool
    weight_reads: frozenset[str] = frozenset()
    norms: frozenset[str] | None = None
    beside: str = ""
    bias_reads: frozenset[str] = frozenset()

    def merged(self, other: "LayerFacts") -> "LayerFacts":
        """Return what both show together."""
        read_by = _distinct([*self.read_by, *other.read_by])
        return LayerFacts(
            self.plain and other.plain,
            read_by[:FEW],
            self.more or other.more or len(read_by) > FEW,
            self.kinds | other.kinds,
            self.via | other.via,
            self.leaves or other.leaves,
            self.weight_reads | other.weight_reads,
            None if self.norms is None or other.norms is None else self.norms | other.norms,
            self.beside or other.beside,
            self.bias_reads | other.bias_reads,
        )


@dataclass(frozen=True)
class Trace:
    """A forward pass, and others where its code goes other ways: facts by qualified name, as first registered.

    Attributes:
        norms: Facts of the BatchNorm-like modules that ran.
        convs: Facts of the convolutions that ran.
        linears: Facts of the linear layers that ran.
        shapes: Shapes of the outputs of every module that ran, in the first pass where that reached all that counts.
        inputs: The example input on the meta device.
        operators: Module and name of each operator that computed values outside of norms in the first pass.
        example: The example input as it was given or made up.
        with_data: Whether the pass needed real tensors.
        functional_norms: Modules that call batch_norm themselves, without a norm.
        past: Parameters that its code finds past its modules, in a global or by a weak reference: a copy runs with
            those of the original.
        graphs: The passes themselves.
        stopped_by: The error that ended the pass after everything that counts had run; None where it ran to its end.
        made_up: Whether nobody gave the example.
        decided: Whether its code decided by values that there are none of.
        asked_where: Whether its code asked for the kind of device of a tensor that was not where the network is.
        asked: Attributes that code outside of each norm asked it for, whether the norm ran or not (`NormFacts.asked`).
    """

    norms: dict[str, NormFacts]
    convs: dict[str, LayerFacts]
    linears: dict[str, LayerFacts]
    shapes: dict[str, Shapes]
    inputs: Any
    operators: frozenset[tuple[str, str]] = field(default=frozenset(), repr=False)
    example: Any = None
    with_data: bool = False
    functional_norms: tuple[str, ...] = ()
    past: tuple[str, ...] = ()
    graphs: tuple[Graph, ...] = field(default=(), repr=False)
    stopped_by: str | None = None
    made_up: bool = False
    decided: bool = False
    asked_where: bool = False
    asked: Mapping[str, Collection[str]] = field(default_factory=dict)

    @property
    def samples(self) -> Samples:
        """How the example input holds its samples, by what the network made of it."""
        return samples_in(self.inputs, (shape for shapes in self.shapes.values() for shape in shapes))

    @property
    def batch(self) -> int:
        """Samples in the example input."""
        return self.samples.count

    def first_reader(self, select: Select) -> Callable[[str], Node | None]:
        """Return a function from a convolution's name to the first node among those that read it that is selected."""
        far = cache(lambda: dict(_firsts(self.graphs, Graph.downstream, select)))

        def first(name: str) -> Node | None:
            facts = self.convs[name]
            return far().get(name) if facts.more else next(filter(select, facts.read_by), None)

        return first

    def first_feeder(self, select: Select) -> Callable[[str], Node | None]:
        """Return a function from a norm's name to the first node among those that feed it that is selected."""
        far = cache(lambda: dict(_firsts(self.graphs, Graph.upstream, select)))

        def first(name: str) -> Node | None:
            facts = self.norms.get(name)
            if facts is None:
                return None
            return far().get(name) if facts.more else next(filter(select, facts.fed_by), None)

        return first

    def left_out(self, names: Collection[str]) -> set[str]:
        """Return those of the named modules that did not run."""
        return {name for name in names if name not in self.norms and name not in self.shapes}


def norm_facts(recorder: Recorder) -> Iterator[tuple[str, NormFacts]]:
    """Yield the facts of every norm that ran, by name."""
    graph = recorder.graph
    upstream = graph.upstream() if recorder.norm_nodes else []
    slices = graph.slices()
    reads: dict[str, list[tuple[str, str]]] = {}
    for leaf, operators in recorder.parameters.reads.items():
        owner, _, key = leaf.rpartition(".")
        reads.setdefault(owner, []).extend((key, operator) for operator in sorted(operators))
    for name, indices in recorder.norm_nodes.items():
        reach = reduce(or_, (upstream[index] for index in indices))
        parents = sum(len(graph.nodes[index].parents) for index in indices)
        fed_by = tuple(graph.nodes[index] for index in reach.ends)
        steps = tuple(recorder.norm_steps.get(name, ()))
        smallest = min(recorder.norm_inputs[name], key=_positions)
        direct = parents == len(indices) and len(fed_by) == 1 and not reach.via
        calls = [graph.nodes[index].parents for index in indices]
        seen = {_named(graph, slices.get(call[0], ())) if len(call) == 1 else () for call in calls}
        parts = seen.pop() if len(seen) == 1 else ()
        own, asked = tuple(reads.get(name, ())), tuple(sorted(recorder.norm_asked.get(name, ())))
        yield name, NormFacts(smallest, fed_by, reach.more, reach.kinds, reach.via, steps, direct, parts, own, asked)


def _positions(shape: tuple[int, ...]) -> int:
    return math.prod(shape[2:])


def _named(graph: Graph, slices: Slices) -> tuple[Slice, ...]:
    """Return slices with the names of their layers; what is no layer's is one slice with what is beside it."""
    found = list[Slice]()
    for index, channels in slices:
        node = graph.nodes[index] if index >= 0 else None
        if node is not None and node.kind in LAYERS:
            found.append(Slice(node.name, channels))
        elif found and not found[-1].layer:
            found[-1] = Slice("", found[-1].channels + channels)
        else:
            found.append(Slice("", channels))
    return tuple(found)


def layer_facts(recorder: Recorder) -> tuple[dict[str, LayerFacts], dict[str, LayerFacts]]:
    """Return the facts of every convolution and of every linear layer that ran, by name."""
    graph = recorder.graph
    convs, linears = dict[str, LayerFacts](), dict[str, LayerFacts]()
    alone = graph.norms_alone()
    pairs = list(graph.updates(recorder.plain))
    both_ways = ((end, other) for one, two in reversed(pairs) for end, other in ((one, two), (two, one)))
    beside = {end: graph.nodes[other].name or "the network's own code" for end, other in both_ways}
    for index, (node, reach) in enumerate(zip(graph.nodes, graph.downstream(), strict=True)):
        if node.kind not in (Kind.CONV, Kind.LINEAR):
            continue
        found = convs if node.kind is Kind.CONV else linears
        leaf = recorder.plain.get(index)
        reads, bias_reads = (
            recorder.parameters.reads.get(own, set()) - OWN_READS[node.kind] if leaf and own else ()
            for own in (leaf, f"{node.name}.bias".lstrip("."))
        )
        read_by = tuple(graph.nodes[end] for end in reach.ends)
        norms = alone.get(index)
        names = None if norms is None else frozenset(graph.nodes[norm].name for norm in norms)
        facts = LayerFacts(
            leaf is not None,
            read_by,
            reach.more,
            reach.kinds,
            reach.via,
            reach.leaves,
            frozenset(reads),
            names,
            beside.get(index, ""),
            frozenset(bias_reads),
        )
        found[node.name] = found[node.name].merged(facts) if node.name in found else facts
    return convs, linears


def _firsts(
    graphs: Iterable[Graph], walk: Callable[[Graph, Select], list[Reach]], select: Select
) -> Iterator[tuple[str, Node]]:
    """Yield layers and the first selected node that their walks meet; of several, what is to stand comes last."""
    for graph in reversed(tuple(graphs)):
        for node, reach in reversed(list(zip(graph.nodes, walk(graph, select), strict=True))):
            if node.kind in NAMED and reach.ends:
                yield node.name, graph.nodes[reach.ends[0]]


def _distinct(nodes: list[Node]) -> tuple[Node, ...]:
    return tuple({(node.kind, node.name): node for node in nodes}.values())
