"""The two walks."""

from normswap.tracing.graph import Graph, Kind, Node


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
    nodes, via = graph().feeders([4])
    assert [node.name for node in nodes] == ["a", "b"]
    assert via == {Kind.CAT, Kind.VIEW}


def test_readers_are_the_first_that_change_values() -> None:
    found = graph()
    nodes, via, leaves = found.readers(1, found.children())
    assert [node.name for node in nodes] == ["bn", "relu"]
    assert via == {Kind.VIEW, Kind.CAT, Kind.ADD}
    assert not leaves
    found.outputs.add(3)
    assert found.readers(1, found.children())[2]
    assert not found.readers(2, found.children())[2]


def test_walks_end_in_graphs_that_meet_again() -> None:
    found = Graph()
    found.add(Node(Kind.INPUT, "input", ()))
    for _ in range(40):  # twice as many ways after each, were they walked one by one
        last = len(found.nodes) - 1
        found.add(Node(Kind.ADD, "add", (last, last)))
    assert [node.name for node in found.feeders([40])[0]] == ["input"]
