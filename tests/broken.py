"""Networks that each break one promise of a converted network, and the check that must say so."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class Fault(nn.Module):
    """Compute something on real tensors; on the meta device, where networks are traced, nothing."""

    def __init__(self, compute: Callable[["Fault", Tensor], Tensor]) -> None:
        super().__init__()
        self.compute = compute

    def forward(self, x: Tensor) -> Tensor:
        return x if x.is_meta else self.compute(self, x)


class Net(nn.Module):
    """Two convolutions, each behind BatchNorm, a module between them, a linear head, and a module behind it."""

    skips = ""
    """Name of the module that the forward pass leaves out."""

    def __init__(self, between: nn.Module | None = None, last: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.between = nn.Identity() if between is None else between
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.pool, self.head = nn.AvgPool2d(2), nn.Linear(8, 4)
        self.last = nn.Identity() if last is None else last

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu()
        y = self.conv2(y if self.skips == "between" else self.between(y))
        y = y if self.skips == "bn2" else self.bn2(y)
        return self.last(self.head(self.pool(y.relu()).mean((2, 3))))


def _fails(_: Fault, x: Tensor) -> Tensor:
    raise RuntimeError("out of order")


def _infinite_but_for_the_first(_: Fault, x: Tensor) -> Tensor:
    return x.masked_fill(torch.arange(len(x)).view(-1, 1) > 0, torch.inf)


def _needs_two(_: Fault, x: Tensor) -> Tensor:
    if len(x) < 2:
        raise ValueError("a single sample")
    return x


@dataclass(frozen=True)
class Broken:
    """A fault, the checks that it fails, what the first of them says, and whether the fault is behind the head."""

    compute: Callable[[Fault, Tensor], Tensor]
    fails: frozenset[str]
    says: str
    last: bool = False


BROKEN = {
    "runs": Broken(_fails, frozenset({"runs"}), "RuntimeError: out of order"),
    "finite": Broken(  # two outputs that are infinite cannot be told to be equal
        _infinite_but_for_the_first,
        frozenset({"finite", "train() equals eval()"}),
        "outputs hold NaN or infinity",
        last=True,
    ),
    "batch size 1": Broken(_needs_two, frozenset({"batch size 1"}), "ValueError: a single sample"),
    "batch size 1, not finite": Broken(
        lambda _, x: x / (len(x) > 1), frozenset({"batch size 1"}), "outputs hold NaN or infinity"
    ),
    "batch independence": Broken(
        lambda _, x: x + x.mean(0), frozenset({"batch independence"}), "changing the other samples moves a sample by"
    ),
    "train() equals eval()": Broken(
        lambda self, x: x.square() if self.training else x, frozenset({"train() equals eval()"}), "largest difference"
    ),
    "gradients": Broken(
        lambda _, x: x + (x - x.detach()).abs().sqrt(), frozenset({"gradients"}), "gradients hold NaN or infinity"
    ),
}
"""By the check that is broken, with a remark where it is broken twice."""


def named(name: str) -> Net:
    """Return the network that breaks a check."""
    fault = Fault(BROKEN[name].compute)
    return Net(last=fault) if BROKEN[name].last else Net(fault)


def runs() -> Net:
    return named("runs")


def finite() -> Net:
    return named("finite")


def batch_size_1() -> Net:
    return named("batch size 1")


def batch_independence() -> Net:
    return named("batch independence")


def train_equals_eval() -> Net:
    return named("train() equals eval()")


def gradients() -> Net:
    return named("gradients")


FACTORIES = {
    "runs": runs,
    "finite": finite,
    "batch size 1": batch_size_1,
    "batch independence": batch_independence,
    "train() equals eval()": train_equals_eval,
    "gradients": gradients,
}
"""For the command line, which calls functions by name."""

X = torch.zeros(2, 3, 16, 16)
