"""The dataflow of one forward pass as a graph, and the two walks that the plan is made from, for all nodes at once."""

from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import chain


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

LAYERS = frozenset({Kind.CONV, Kind.LINEAR})
"""Kinds of layers that mix channels by filters."""

NAMED = frozenset({Kind.CONV, Kind.LINEAR, Kind.NORM})
"""Kinds of nodes that carry a layer's name; others carry an operator's."""

TIMES = frozenset("mul div neg dropout native_dropout".split())
"""Operators that multiply values by constants, each where it is; noise is one, too, as dropout's."""

MOVES = frozenset(
    """view reshape reshape_alias unsafe_view view_as view_copy flatten unflatten squeeze unsqueeze transpose t permute
    permute_copy movedim swapaxes contiguous clone to_copy alias detach constant_pad_nd""".split()
)
"""Operators behind which all of a channel's values are in one channel again, on whatever axis, with zeros at most."""

AVERAGES = frozenset(
    """avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d mean
    upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_nearest_exact1d upsample_nearest_exact2d
    upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d upsample_bilinear2d_aa upsample_bicubic2d
    upsample_bicubic2d_aa upsample_trilinear3d""".split()
)
"""Operators that add up values of a channel, each times a constant."""

MANY = 256
"""Slices of a concatenation that are told apart: a network that collects all it made holds their square otherwise."""

FEW = 8
"""Ends of a walk that are kept: along a residual stream every layer reads what all before it made."""


Slices = tuple[tuple[int, int], ...]
"""What a node's channels are: nodes, −1 for none, and how many channels each makes."""


@dataclass(slots=True)
class Node:
    """One operation: what it is, what it reads, the module or operator it is named after."""

    kind: Kind
    name: str
    parents: tuple[int, ...]
    shape: tuple[int, ...] = ()
    steered_by: frozenset[int] = frozenset()
    """Parents that say where values come from, or by what they are weighed: scaling them does not scale the result."""
    slices: Slices = ()
    """Of a concatenation along axis 1: its operands."""


Select = Callable[[Node], bool]


@dataclass(frozen=True, slots=True)
class Reach:
    """What a walk meets from one node on: of many ends the first few, so that all walks together stay small.

    Attributes:
        ends: The first FEW nodes, in the order they ran, that change values.
        more: Whether there are others.
        kinds: What all of them are: kinds, with the operator's name where a node has no layer's.
        via: Kinds of nodes between.
        leaves: Whether a value leaves the network on the way.
    """

    ends: tuple[int, ...] = ()
    more: bool = False
    kinds: frozenset[tuple[Kind, str]] = frozenset()
    via: frozenset[Kind] = frozenset()
    leaves: bool = False

    def __or__(self, other: "Reach") -> "Reach":
        """Return what both meet."""
        if self is other or other is NOTHING:
            return self
        if self is NOTHING:
            return other
        ends = sorted({*self.ends, *other.ends})
        return Reach(
            tuple(ends[:FEW]),
            self.more or other.more or len(ends) > FEW,
            self.kinds | other.kinds,
            self.via | other.via,
            self.leaves or other.leaves,
        )


NOTHING = Reach()


@dataclass(slots=True)
class Graph:
    """Nodes in the order they ran, and which of them leave the network."""

    nodes: list[Node] = field(default_factory=list)
    outputs: set[int] = field(default_factory=set)
    fixed: set[int] = field(default_factory=set)
    """Nodes whose results were written over, or whose gradients a hook gets: these are to stay as large as they are."""

    def add(self, node: Node) -> int:
        """Append a node and return its index."""
        self.nodes.append(node)
        return len(self.nodes) - 1

    def upstream(self, select: Select = lambda _: True) -> list[Reach]:
        """Return what feeds each node: the first nodes that change values, on every way back.

        Args:
            select: Which of those count.
        """
        found, ends = list[Reach](), self._ends(select)
        for node in self.nodes:
            reach = NOTHING
            for parent in node.parents:
                reach |= self._beyond(parent, found[parent], ends)
            found.append(reach)
        return found

    def downstream(self, select: Select = lambda _: True) -> list[Reach]:
        """Return what reads each node: the first nodes that change its values, on every way on.

        Args:
            select: Which of those count.
        """
        ends, found = self._ends(select), [NOTHING] * len(self.nodes)
        known = {parent for node in self.nodes for parent in node.parents} | self.outputs | self.fixed
        for index in range(len(self.nodes) - 1, -1, -1):
            node = self.nodes[index]
            if index in self.outputs:
                found[index] |= Reach(leaves=True)
            met = self._beyond(index, found[index], ends)
            if node.kind in PASSING and index not in known:  # what becomes of it is not known: numpy has no operators
                met |= ends.get(index, NOTHING)
            for parent in node.parents:  # all that reads a node ran after it, and is known by now
                found[parent] |= ends.get(index, NOTHING) if parent in node.steered_by else met
        return found

    def slices(self) -> dict[int, Slices]:
        """Return what the channels of each layer and of each concatenation are.

        A concatenation in another is spelled out; what is multiplied by constants, averaged or moved channel by channel
        counts as what it was; a node that is none of these, is not there.
        """
        found: dict[int, Slices] = {}
        for index, node in enumerate(self.nodes):
            if node.kind in LAYERS and len(node.shape) > 1:
                found[index] = ((index, node.shape[1]),)
            elif node.slices:
                parts = [_spelled_out(parent, size, found) for parent, size in node.slices]
                if sum(map(len, parts)) <= MANY:
                    found[index] = tuple(chain.from_iterable(parts))
            elif self._follows(node) and node.parents[0] in found:
                found[index] = found[node.parents[0]]
        return found

    def _follows(self, node: Node) -> bool:
        """Tell whether a node is another one whose channels it multiplies, averages or moves, each by itself."""
        if len(node.parents) != 1 or node.parents[0] in node.steered_by:
            return False
        times = node.name in TIMES and node.kind in (Kind.SCALE, Kind.VIEW)
        return (
            (times and node.shape == self.nodes[node.parents[0]].shape) or node.name in MOVES or node.name in AVERAGES
        )

    def norms_alone(self) -> dict[int, frozenset[int] | None]:
        """Return for each layer and concatenation the norms that read it; None where anything else does, too.

        What the norms of a concatenation read, or of what follows another node's channels, its operands' do.
        """
        found: dict[int, frozenset[int] | None] = {}
        known = self.slices()
        readers: dict[int, list[int]] = {}
        for index, node in enumerate(self.nodes):
            for parent in node.parents:
                readers.setdefault(parent, []).append(index)
        for index in range(len(self.nodes) - 1, -1, -1):
            if index not in known:
                continue
            norms = frozenset[int]()
            for reader in readers.get(index, ()):
                node = self.nodes[reader]
                read = frozenset([reader]) if node.kind is Kind.NORM and len(node.parents) == 1 else found.get(reader)
                if read is None or not (node.kind is Kind.NORM or node.slices or self._follows(node)):
                    break
                norms |= read
            else:
                found[index] = None if index in self.outputs or index in self.fixed else norms
                continue
            found[index] = None
        return found

    def updates(self, plain: Container[int]) -> Iterator[tuple[int, int]]:
        """Yield convolutions in pairs: one, and another that updates its kernel beside it, as an adapter does.

        Their outputs add up, over one input. The update is the second of two convolutions with nothing between (their
        product is a kernel of low rank), or its kernel is computed from something else.

        Args:
            plain: The convolutions whose kernel is a parameter as it is.
        """
        through, summed = list[int](), list[tuple[int, ...]]()
        for index, node in enumerate(self.nodes):
            copies = node.kind in (Kind.VIEW, Kind.SCALE) and len(node.parents) == 1
            through.append(through[node.parents[0]] if copies else index)
            found: tuple[int, ...] = (index,) if node.kind is Kind.CONV else ()
            if node.kind in (Kind.VIEW, Kind.SCALE, Kind.ADD):
                found = tuple(sorted({end for parent in node.parents for end in summed[parent]})[-FEW:])
            summed.append(found)
            if node.kind is not Kind.ADD or len(found) < 2:
                continue
            first = {end: self._first_parent(end, through) for end in found}
            for update in found:
                start = first[update]
                if update in plain:
                    start = self._first_parent(start, through) if self.nodes[start].kind is Kind.CONV else -1
                yield from ((end, update) for end in found if end != update and start >= 0 and first[end] == start)

    def _first_parent(self, index: int, through: list[int]) -> int:
        """Return what a node reads, past what only copies or scales it; −1 where that is no one node."""
        parents = self.nodes[index].parents
        return through[parents[0]] if len(parents) == 1 else -1

    def _ends(self, select: Select) -> dict[int, Reach]:
        """Return what a walk meets in each node that ends it; a layer that ran several times counts once."""
        first: dict[tuple[Kind, str], int] = {}
        return {
            index: Reach((first.setdefault((node.kind, node.name), index),), kinds=frozenset([_label(node)]))
            for index, node in enumerate(self.nodes)
            if select(node)
        }

    def _beyond(self, index: int, reach: Reach, ends: Mapping[int, Reach]) -> Reach:
        kind = self.nodes[index].kind
        if kind not in PASSING:
            return ends.get(index, NOTHING)
        return reach if kind in reach.via else reach | Reach(via=frozenset([kind]))


def _label(node: Node) -> tuple[Kind, str]:
    return node.kind, "" if node.kind in NAMED else node.name


def _spelled_out(index: int, channels: int, known: Mapping[int, Slices]) -> Slices:
    """Return a node as slices of what makes its channels, where that is known of all of them, else as one slice."""
    found = known.get(index, ())
    return found if sum(size for _, size in found) == channels else ((index, channels),)
