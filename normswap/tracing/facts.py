"""What a forward pass showed: for each norm what feeds it, for each convolution what reads it."""

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from normswap.tracing.graph import Kind, Node
from normswap.tracing.recorder import Recorder, Shapes

OWN_READS = frozenset("convolution deform_conv2d t addmm mm linear".split())
"""Operators by which a convolution or a linear layer reads its own weight."""


@dataclass(frozen=True)
class NormFacts:
    """What one BatchNorm-like module sees, over all its calls.

    Attributes:
        shape: (N, C, *) shape of its smallest input.
        fed_by: The first nodes upstream that change values.
        via: Kinds of nodes between those and the norm.
        steps: The operators and modules that its forward runs.
        direct: Whether its input is, in every call, the very tensor that the one node feeding it made.
    """

    shape: tuple[int, ...]
    fed_by: tuple[Node, ...]
    via: frozenset[Kind]
    steps: tuple[str, ...]
    direct: bool = False


@dataclass(frozen=True)
class LayerFacts:
    """What happens to the output of one weight of a convolution or a linear layer, over all its calls.

    Attributes:
        plain: Whether the operator read the parameter itself and not something computed from it.
        read_by: The first nodes downstream that change values.
        via: Kinds of nodes between the convolution and those.
        leaves: Whether the output leaves the network.
        weight_reads: Other operators that read the weight.
    """

    plain: bool
    read_by: tuple[Node, ...]
    via: frozenset[Kind]
    leaves: bool
    weight_reads: frozenset[str] = frozenset()

    def merged(self, other: "LayerFacts") -> "LayerFacts":
        """Return what both show together."""
        return LayerFacts(
            self.plain and other.plain,
            _distinct([*self.read_by, *other.read_by]),
            self.via | other.via,
            self.leaves or other.leaves,
            self.weight_reads | other.weight_reads,
        )


@dataclass(frozen=True)
class Trace:
    """One forward pass (two where the first left norms out): facts by qualified name, as first registered.

    Attributes:
        norms: Facts of the BatchNorm-like modules that ran.
        convs: Facts of the convolutions that ran.
        linears: Facts of the linear layers that ran.
        shapes: Shapes of the outputs of every module that ran.
        batch: Samples in the example input.
        inputs: The example input on the meta device.
        example: The example input as it was given or made up.
        with_data: Whether the pass needed real tensors.
        functional_norms: Modules that call batch_norm themselves, without a norm.
        stopped_by: The error that ended the pass after everything that counts had run; None where it ran to its end.
    """

    norms: dict[str, NormFacts]
    convs: dict[str, LayerFacts]
    linears: dict[str, LayerFacts]
    shapes: dict[str, Shapes]
    batch: int
    inputs: Any
    example: Any = None
    with_data: bool = False
    functional_norms: tuple[str, ...] = ()
    stopped_by: str | None = None

    def left_out(self, names: Collection[str]) -> set[str]:
        """Return those of the named modules that did not run."""
        return {name for name in names if name not in self.norms and name not in self.shapes}


def norm_facts(recorder: Recorder) -> Iterator[tuple[str, NormFacts]]:
    """Yield the facts of every norm that ran, by name."""
    graph = recorder.graph
    for name, indices in recorder.norm_nodes.items():
        parents = [parent for index in indices for parent in graph.nodes[index].parents]
        fed_by, via = graph.feeders(parents)
        steps = tuple(recorder.norm_steps.get(name, ()))
        smallest = min(recorder.norm_inputs[name], key=lambda shape: math.prod(shape[2:]))
        direct = len(parents) == len(indices) and len(_distinct(fed_by)) == 1 and not via
        yield name, NormFacts(smallest, _distinct(fed_by), frozenset(via), steps, direct)


def layer_facts(recorder: Recorder, kind: Kind) -> dict[str, LayerFacts]:
    """Return the facts of every convolution, or every linear layer, that ran, by name."""
    graph, children = recorder.graph, recorder.graph.children()
    found: dict[str, LayerFacts] = {}
    for index, node in enumerate(graph.nodes):
        if node.kind is not kind:
            continue
        read_by, via, leaves = graph.readers(index, children)
        leaf = recorder.plain.get(index)
        reads = recorder.parameters.reads.get(leaf, set()) - OWN_READS if leaf else ()
        facts = LayerFacts(leaf is not None, _distinct(read_by), frozenset(via), leaves, frozenset(reads))
        found[node.name] = found[node.name].merged(facts) if node.name in found else facts
    return found


def _distinct(nodes: list[Node]) -> tuple[Node, ...]:
    return tuple({(node.kind, node.name): node for node in nodes}.values())
