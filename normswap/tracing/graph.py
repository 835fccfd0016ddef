"""The dataflow of one forward pass as a graph, and the two walks that the plan is made from."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum


class Kind(StrEnum):
    """What a node does with its input."""

    INPUT = "input"
    CONV = "conv"
    LINEAR = "linear"
    NORM = "norm"  # a BatchNorm-like module of the model
    OTHER_NORM = "other norm"  # group, layer or instance normalization
    VIEW = "view"  # the same values elsewhere: reshape, slice, pad, copy
    SCALE = "scale"  # times or plus a constant or a parameter
    POOL = "pool"  # each channel by itself: pooling, resizing
    ADD = "add"
    CAT = "cat"
    OTHER = "other"


PASSING = frozenset({Kind.VIEW, Kind.SCALE, Kind.POOL, Kind.ADD, Kind.CAT})
"""Kinds that both walks go through; all others end a walk."""


@dataclass(slots=True)
class Node:
    """One operation: what it is, what it reads, the module or operator it is named after."""

    kind: Kind
    name: str
    parents: tuple[int, ...]
    shape: tuple[int, ...] = ()
    steered_by: frozenset[int] = frozenset()
    """Parents that say where values come from, or by what they are weighed: scaling them does not scale the result."""


@dataclass(slots=True)
class Graph:
    """Nodes in the order they ran, and which of them leave the network."""

    nodes: list[Node] = field(default_factory=list)
    outputs: set[int] = field(default_factory=set)
    places: set[int] = field(default_factory=set)
    """Nodes whose results were written over."""

    def add(self, node: Node) -> int:
        """Append a node and return its index."""
        self.nodes.append(node)
        return len(self.nodes) - 1

    def feeders(self, starts: Iterable[int]) -> tuple[list[Node], set[Kind]]:
        """Walk back from `starts` to the first nodes that change values.

        Returns:
            Those nodes in the order they ran, and the kinds walked through on the way.
        """
        seen, stops, via, stack = set[int](), set[int](), set[Kind](), list(starts)
        while stack:
            index = stack.pop()
            if index in seen:
                continue
            seen.add(index)
            node = self.nodes[index]
            if node.kind in PASSING:
                via.add(node.kind)
                stack.extend(node.parents)
            else:
                stops.add(index)
        return [self.nodes[index] for index in sorted(stops)], via

    def readers(self, start: int, children: dict[int, list[int]]) -> tuple[list[Node], set[Kind], bool]:
        """Walk forward from `start` to the first nodes that change its values.

        Args:
            start: Index of the node whose output is followed.
            children: As `children` returns it.

        Returns:
            Those nodes in the order they ran, the kinds walked through, and whether any value leaves the network.
        """
        seen, stops, via, leaves, stack = {start}, set[int](), set[Kind](), start in self.outputs, [start]
        while stack:
            parent = stack.pop()
            if parent not in children and parent not in self.outputs and parent not in self.places and parent != start:
                stops.add(parent)  # what becomes of it is not known: numpy reads without an operator
            for index in children.get(parent, ()):
                node = self.nodes[index]
                if node.kind not in PASSING or parent in node.steered_by:
                    stops.add(index)
                    continue
                if index in seen:
                    continue
                seen.add(index)
                via.add(node.kind)
                leaves = leaves or index in self.outputs
                stack.append(index)
        return [self.nodes[index] for index in sorted(stops)], via, leaves

    def children(self) -> dict[int, list[int]]:
        """Return the nodes that read each node."""
        readers: dict[int, list[int]] = {}
        for index, node in enumerate(self.nodes):
            for parent in node.parents:
                readers.setdefault(parent, []).append(index)
        return readers
