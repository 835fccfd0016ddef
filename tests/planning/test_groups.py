"""Group counts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from normswap.errors import InvalidOption
from normswap.planning.groups import divisors, group_counts, num_groups_for


@pytest.mark.parametrize(
    ("channels", "options", "count"),
    [
        (64, {}, 32),
        (48, {}, 24),
        (32, {}, 16),  # two channels a group at least
        (83, {}, 1),
        (4103, {}, 11),
        (64, {"groups": 8}, 8),
        (64, {"positions": 1}, 4),  # 16 elements a group
        (8, {"positions": 1}, 1),
        (64, {"group_size": 16}, 4),
        (40, {"group_size": 16}, 2),
        (8, {"group_size": 16}, 1),
        (64, {"to": "layer"}, 1),
        (64, {"to": "instance", "positions": 49}, 64),
        (64, {"to": "instance", "positions": 1}, 32),
        (1, {}, 1),
    ],
)
def test_count(channels: int, options: dict[str, int], count: int) -> None:
    assert num_groups_for(channels, **options) == count  # type: ignore[arg-type]


@given(st.integers(1, 5000), st.integers(1, 64), st.integers(1, 4096))
def test_never_degenerate(channels: int, groups: int, positions: int) -> None:
    count = num_groups_for(channels, groups=groups, positions=positions)
    assert channels % count == 0
    assert count <= groups
    assert count == 1 or (channels // count >= 2 and channels // count * positions >= 16)


@given(st.integers(1, 5000))
def test_divisors(number: int) -> None:
    assert divisors(number) == [d for d in range(number, 0, -1) if number % d == 0]


@pytest.mark.parametrize(
    "options", [{"groups": 0}, {"groups": -4}, {"groups": 2.5}, {"groups": True}, {"group_size": 0}]
)
def test_bad_counts(options: dict[str, int]) -> None:
    with pytest.raises(InvalidOption, match="must be a whole number of at least 1"):
        num_groups_for(64, **options)  # type: ignore[arg-type]


def test_bad_kind() -> None:
    with pytest.raises(InvalidOption, match="to='batch' is not one of"):
        num_groups_for(64, to="batch")


@pytest.mark.parametrize(
    ("channels", "positions", "counts"),
    [
        (48, 1, [3, 2, 1]),
        (64, None, [32, 16, 8, 4, 2, 1]),
        (64, 1, [4, 2, 1]),
        (64, 8, [32, 16, 8, 4, 2, 1]),
        (64, 7, [16, 8, 4, 2, 1]),
        (7, None, [1]),
        (1, 1, [1]),
    ],
)
def test_counts_that_fit(channels: int, positions: int | None, counts: list[int]) -> None:
    assert group_counts(channels, positions=positions) == counts


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"groups": 1}, 1),
        ({"groups": 32, "positions": 8}, 32),  # 2 channels of 8 positions are 16 elements
        ({"groups": 32, "positions": 7}, 16),
        ({"group_size": 1}, 64),
        ({"group_size": 1, "positions": 16}, 64),
        ({"group_size": 1, "positions": 15}, 32),
        ({"group_size": 64}, 1),
        ({"group_size": 65}, 1),
        ({"group_size": 3}, 16),  # the smallest divisor that is no less: 4 channels a group
        ({"to": "instance", "positions": 2}, 64),
        ({"to": "instance", "groups": 2, "group_size": 16}, 64),
        ({"to": "layer", "groups": 2, "group_size": 16, "positions": 1}, 1),
    ],
    ids=str,
)
def test_edges_of_64_channels(options: dict[str, int], count: int) -> None:
    assert num_groups_for(64, **options) == count  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 0}, "groups=0 must be a whole number of at least 1"),
        ({"group_size": True}, "group_size=True must be a whole number of at least 1"),
        ({"groups": "8"}, "groups='8' must be a whole number of at least 1"),
        ({"groups": None, "group_size": -1}, "group_size=-1 must be a whole number of at least 1"),
        ({"to": "batch"}, "to='batch' is not one of 'group', 'layer', 'instance', 'frozen'"),
        ({"to": "layer", "groups": 0}, "groups=0 must be a whole number of at least 1"),
    ],
    ids=str,
)
def test_messages(options: dict[str, int], message: str) -> None:
    with pytest.raises(InvalidOption) as caught:
        num_groups_for(64, **options)  # type: ignore[arg-type]
    assert str(caught.value) == message
