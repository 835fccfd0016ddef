"""Which layers' channels a norm meets, and which norms a layer's output meets."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from normswap.networks.network import Network
from normswap.tracing.facts import Slice
from normswap.tracing.forward import trace
from normswap.tracing.graph import MANY


class Net(nn.Module):
    """Two convolutions of three and four channels, and a norm, wired as a test says."""

    def __init__(self, wiring: Callable[["Net", Tensor], Tensor], channels: int) -> None:
        super().__init__()
        self.a, self.b, self.bn = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 4, 1), nn.BatchNorm2d(channels)
        self.wiring = wiring

    def forward(self, x: Tensor) -> Tensor:
        return self.wiring(self, x)


A, B = Slice("a", 3), Slice("b", 4)
WIRED = {
    "itself": (lambda m, x: m.bn(m.a(x)), 3, (A,), {"bn"}),
    "concatenation": (lambda m, x: m.bn(torch.cat([m.a(x), m.b(x)], 1)), 7, (A, B), {"bn"}),
    "counted from the end": (lambda m, x: m.bn(torch.cat([m.b(x), m.a(x)], -3)), 7, (B, A), {"bn"}),
    "nested": (
        lambda m, x: m.bn(torch.cat([x, torch.cat([m.b(x), x], 1), x, torch.cat([m.a(x)], 1)], 1)),
        13,
        (Slice("", 2), B, Slice("", 4), A),
        {"bn"},
    ),
    "twice": (lambda m, x: m.bn(torch.cat([m.a(x), m.a(-x)], 1)), 6, (A, A), {"bn"}),
    "activations": (lambda m, x: m.bn(torch.cat([m.a(x).relu(), m.b(x)], 1)), 7, (Slice("", 3), B), None),
    "a view of it": (lambda m, x: m.bn(torch.cat([m.a(x)[:, :2], m.b(x)], 1)), 6, (Slice("", 2), B), None),
    "another axis": (lambda m, x: m.bn(torch.cat([m.a(x), m.a(x)], 2)), 3, (), None),
    "in other places": (lambda m, x: m.bn(torch.cat([m.a(x), x[:, :1]], 1)) + m.bn(m.b(x)), 4, (), {"bn"}),
    "partly written over": (
        lambda m, x: (lambda y: (y[:, :1].zero_(), m.bn(torch.cat([y, m.b(x)], 1)))[1])(m.a(x)),
        7,
        (),
        None,
    ),
    "read by others, too": (
        lambda m, x: (lambda y: m.bn(y) * y.mean())(torch.cat([m.a(x), m.b(x)], 1)),
        7,
        (A, B),
        None,
    ),
    "leaving": (lambda m, x: (lambda y: (m.bn(y), y))(torch.cat([m.a(x), m.b(x)], 1)), 7, (A, B), None),
}


@pytest.mark.parametrize(("wiring", "channels", "slices", "norms"), WIRED.values(), ids=WIRED)
def test_slices_are_what_the_pass_concatenates(
    wiring: Callable[[Net, Tensor], Tensor], channels: int, slices: tuple[Slice, ...], norms: set[str] | None
) -> None:
    found = trace(Network(Net(wiring, channels).eval()), torch.zeros(2, 2, 5, 5))
    assert found.norms["bn"].slices == slices
    assert found.convs["a"].norms == norms


def test_what_collects_all_that_was_made_is_not_told_apart_without_end() -> None:
    def wiring(m: Net, x: Tensor) -> Tensor:
        made = m.a(x)
        for _ in range(MANY + 10):
            made = torch.cat([made, x], 1)
        return m.bn(made)

    channels = 3 + 2 * (MANY + 10)
    found = trace(Network(Net(wiring, channels).eval()), torch.zeros(2, 2, 5, 5))
    assert found.convs["a"].norms is None
    assert "a" not in {own.layer for own in found.norms["bn"].slices}
