"""The two walks."""

import random

import pytest

from normswap.tracing.graph import FEW, PASSING, Graph, Kind, Node


def graph() -> Graph:
    """Input -> conv a -> view -> cat -> norm; conv b -> add(view, b) -> relu; the view leaves the network."""
    found = Graph()
    for node in (
        Node(Kind.INPUT, "input", ()), Node(Kind.CONV, "a", (0,)), Node(Kind.CONV, "b", (0,)),
        Node(Kind.VIEW, "view", (1,)), Node(Kind.CAT, "cat", (3, 2)), Node(Kind.NORM, "bn", (4,)),
        Node(Kind.ADD, "add", (3, 2)), Node(Kind.OTHER, "relu", (6,)),
    ):  # fmt: skip
        found.add(node)
    return found


def test_feeders_are_the_first_that_change_values() -> None:
    found = graph()
    reach = found.upstream()[5]
    assert [found.nodes[end].name for end in reach.ends] == ["a", "b"]
    assert reach.via == {Kind.CAT, Kind.VIEW}
    assert reach.kinds == {(Kind.CONV, "")}


def test_readers_are_the_first_that_change_values() -> None:
    found = graph()
    reach = found.downstream()[1]
    assert [found.nodes[end].name for end in reach.ends] == ["bn", "relu"]
    assert reach.via == {Kind.VIEW, Kind.CAT, Kind.ADD}
    assert reach.kinds == {(Kind.NORM, ""), (Kind.OTHER, "relu")}
    assert not reach.leaves
    found.outputs.add(3)
    assert found.downstream()[1].leaves
    assert not found.downstream()[2].leaves


def test_walks_end_in_graphs_that_meet_again() -> None:
    found = Graph()
    found.add(Node(Kind.INPUT, "input", ()))
    for _ in range(40):  # twice as many ways after each, were they walked one by one
        last = len(found.nodes) - 1
        found.add(Node(Kind.ADD, "add", (last, last)))
    assert [found.nodes[end].name for end in found.upstream()[40].ends] == ["input"]


def test_a_layer_that_runs_often_is_one_end() -> None:
    found = Graph()
    found.add(Node(Kind.INPUT, "input", ()))
    for _ in range(3 * FEW):
        found.add(Node(Kind.CONV, "shared", (0,)))
    found.add(Node(Kind.CAT, "cat", tuple(range(1, 3 * FEW + 1))))
    found.add(Node(Kind.NORM, "bn", (len(found.nodes) - 1,)))
    reach = found.upstream()[-1]
    assert (reach.ends, reach.more) == ((1,), False)


def walked(graph: Graph, start: int, back: bool) -> tuple[set[int], set[Kind], bool]:
    """Walk from one node alone, way by way; forward, what is steered ends a way, and what nothing is known of."""
    ends, via, leaves, stack, seen = set[int](), set[Kind](), not back and start in graph.outputs, [start], {start}
    known = graph.outputs | graph.fixed
    while stack:
        here = stack.pop()
        ahead = graph.nodes[here].parents if back else [i for i, n in enumerate(graph.nodes) if here in n.parents]
        if not back and not ahead and here not in known and here != start:
            ends.add(here)
        for index in ahead:
            if not back and here in graph.nodes[index].steered_by:
                ends.add(index)
                continue
            if index in seen:
                continue
            seen.add(index)
            if graph.nodes[index].kind in PASSING:
                via.add(graph.nodes[index].kind)
                leaves = leaves or (not back and index in graph.outputs)
                stack.append(index)
            else:
                ends.add(index)
    return ends, via, leaves


@pytest.mark.parametrize("seed", range(20))
def test_all_walks_at_once_are_each_walk_alone(seed: int) -> None:
    drawn, found = random.Random(seed), Graph()
    kinds = [*PASSING, Kind.ADD, Kind.ADD, Kind.CONV, Kind.NORM, Kind.OTHER]
    for index in range(60):
        parents = tuple({drawn.randrange(index) for _ in range(drawn.randint(1, 3))}) if index else ()
        steered = frozenset(parent for parent in parents if drawn.random() < 0.1)
        kind = drawn.choice(sorted(kinds)) if index else Kind.INPUT
        found.add(Node(kind, str(index), parents, steered_by=steered))
    found.outputs = {drawn.randrange(60) for _ in range(3)}
    found.fixed = {drawn.randrange(60) for _ in range(9)}
    for back, reaches in ((True, found.upstream()), (False, found.downstream())):
        norms = (found.upstream if back else found.downstream)(lambda node: node.kind is Kind.NORM)
        for start in range(60):
            ends, via, leaves = walked(found, start, back)
            reach = reaches[start]
            assert reach.ends == tuple(sorted(ends)[:FEW])
            assert reach.more is (len(ends) > FEW)
            assert {kind for kind, _ in reach.kinds} == {found.nodes[end].kind for end in ends}
            assert reach.via == via
            assert reach.leaves is (leaves and not back)
            assert norms[start].ends == tuple(sorted(i for i in ends if found.nodes[i].kind is Kind.NORM)[:FEW])
