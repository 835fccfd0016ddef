"""A network that `load` is given computes what the saved one did, or is refused with the layer that does not."""

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import normswap
from normswap.checkpoint.folder import read_config
from normswap.checkpoint.likeness import must_be_alike, traits_of

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.then, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8)
        self.pool, self.drop, self.head = nn.MaxPool2d(2), nn.Dropout(), nn.Linear(8, 4)
        self.act, self.late = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.pool(self.act(self.bn1(self.first(x))))
        return self.head(self.drop(self.late(self.bn2(self.then(y))).mean((2, 3))))  # type: ignore[no-any-return]


def small() -> nn.Module:
    torch.manual_seed(0)
    return Small().eval()


def reflecting(net: Any) -> None:
    net.then.padding_mode, net.then._reversed_padding_repeated_twice = "reflect", [1, 1, 1, 1]


def by_another_forward(net: Any) -> None:
    net.forward = lambda x: net.head(net.act(net.bn1(net.first(x))).mean((2, 3)))


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "stride": (lambda net: setattr(net.then, "stride", (2, 2)), "then"),
    "padding": (lambda net: setattr(net.then, "padding", (0, 0)), "then"),
    "dilation": (lambda net: setattr(net.first, "dilation", (2, 2)), "first"),
    "padding mode": (reflecting, "then"),
    "activation": (lambda net: setattr(net, "act", nn.GELU()), "act"),
    "slope": (lambda net: setattr(net, "late", nn.LeakyReLU(0.3)), "late"),
    "pool": (lambda net: setattr(net.pool, "kernel_size", 3), "pool"),
    "hook": (lambda net: net.head.register_forward_hook(lambda _module, _args, y: 2 * y), "head"),
    "forward of a layer": (lambda net: setattr(net.late, "forward", torch.tanh), "late"),
    "forward": (by_another_forward, "the network"),
}


@pytest.mark.parametrize(("change", "layer"), CHANGES.values(), ids=CHANGES)
def test_what_a_file_does_not_hold_must_be_the_given_network_s(
    change: Callable[[Any], Any], layer: str, tmp_path: Path
) -> None:
    converted = normswap.convert(small(), example_input=X)
    change(converted)
    normswap.save(converted, tmp_path)
    with pytest.raises(normswap.PlanMismatch, match=f"^{layer}: puts out something else than the saved one did; pass"):
        normswap.load(tmp_path, model=small())
    given = small()
    if layer != "the network":
        change(given)
        assert torch.equal(normswap.load(tmp_path, model=given)(X), converted(X))


class Shorter(Small):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.bn1(self.first(x))).mean((2, 3)))  # type: ignore[no-any-return]


def test_a_layer_that_ran_must_run(tmp_path: Path) -> None:
    normswap.save(normswap.convert(small(), example_input=X), tmp_path)
    with pytest.raises(normswap.PlanMismatch, match="^pool: ran in the saved network and does not in this one; pass"):
        normswap.load(tmp_path, model=Shorter())
    given = small()
    given.head.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(normswap.PlanMismatch, match=r"^the network does not run as the saved one did \(ZeroDivision"):
        normswap.load(tmp_path, model=given)


HARMLESS: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda net: None,
    "dropout": lambda net: setattr(net.drop, "p", 0.9),
    "in place": lambda net: setattr(net.act, "inplace", True),
    "bfloat16": lambda net: net.bfloat16(),
    "a hook that looks": lambda net: net.head.register_forward_hook(lambda *_: None),
}


@pytest.mark.parametrize("change", HARMLESS.values(), ids=HARMLESS)
def test_what_changes_nothing_may_differ(change: Callable[[Any], Any], tmp_path: Path) -> None:
    converted = normswap.convert(small(), example_input=X)
    normswap.save(converted, tmp_path)
    given = small()
    change(given)
    normswap.load(tmp_path, model=given)


def test_other_weights_and_another_head_put_out_something_else(tmp_path: Path) -> None:
    converted = normswap.convert(small(), example_input=X)
    normswap.save(converted, tmp_path / "saved")
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.mul_(1.5)
    torch.save(converted.state_dict(), tmp_path / "tuned.pt")
    assert torch.equal(normswap.load(tmp_path / "saved", model=small(), weights=tmp_path / "tuned.pt")(X), converted(X))
    given: Any = small()
    given.head = nn.Linear(8, 7)
    assert normswap.load(tmp_path / "saved", model=given, num_classes=7)(X).shape == (2, 7)


class Restless(Small):
    """Its code draws, counts, and waits for a value."""

    def __init__(self, *, endless: bool = False) -> None:
        super().__init__()
        self.calls, self.endless = 0, endless

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x + 0.1 * torch.randn_like(x))
        self.calls += 1
        while self.endless and not x.is_meta and float(y.detach().abs().max()) > -1:
            y = y * 0.5
        return y + self.calls


def test_what_is_drawn_tells_nothing(tmp_path: Path) -> None:
    net = normswap.convert(Restless().eval(), example_input=X)
    assert set(traits_of(net, normswap.plan_of(net).inputs)) == {"."}
    before, state = net.calls, torch.get_rng_state()
    normswap.save(net, tmp_path)
    assert (net.calls, torch.get_rng_state().tolist()) == (before, state.tolist())
    normswap.load(tmp_path, model=Restless())


@pytest.mark.parametrize("drawn", [random.random, np.random.rand], ids=["Python's", "numpy's"])
def test_what_python_or_numpy_draws_tells_nothing(drawn: Callable[[], float], tmp_path: Path) -> None:
    class Drawing(Small):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * (0.5 + drawn()))

    normswap.save(normswap.convert(Drawing().eval(), example_input=X), tmp_path)
    state = random.getstate(), np.random.get_state()[2]
    drawn()
    normswap.load(tmp_path, model=Drawing())
    assert state != (random.getstate(), np.random.get_state()[2])


class Ranked(Small):
    """Goes on with what ranks first, by a score that rounding decides."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.late(self.bn2(self.then(self.act(self.bn1(self.first(x))))))
        order = (1e4 * y.flatten(2)).sin().sum(1).argsort(1)
        best = y.flatten(2).gather(2, order[:, None, :3].expand(-1, 8, -1))
        return self.head(best.flatten(1)[:, :8])  # type: ignore[no-any-return]


def test_what_another_machine_may_rank_otherwise_tells_nothing() -> None:
    torch.manual_seed(0)
    net = normswap.convert(Ranked().eval(), example_input=X)
    told = traits_of(net, normswap.plan_of(net).inputs)
    assert {"first", "then", "bn2", "late"} <= told.keys()
    assert not {"head", ""} & told.keys()


def test_a_loop_that_does_not_end_tells_nothing() -> None:
    net = normswap.convert(small(), example_input=X)
    plan = normswap.plan_of(net)
    assert traits_of(Restless(endless=True).eval(), plan.inputs) == {}
    assert traits_of(net, None) == {}


@pytest.mark.parametrize(
    "saved",
    [[], {"first": [1.0]}, {"first": [1.0, 2.0, 3.0, 4.0, float("nan")]}, {"a\nb": [0] * 5}, {"": [10**400] * 5}],
)
def test_traits_from_a_file_are_looked_at(saved: Any, tmp_path: Path) -> None:
    net = normswap.convert(small(), example_input=X)
    assert len(read_config(normswap.save(net, tmp_path))["normswap"]["outputs"]) == 11
    with pytest.raises(normswap.CheckpointError, match="^here: what its layers put out cannot be "):
        must_be_alike(copy.deepcopy(net), normswap.plan_of(net).inputs, saved, "here")


def test_older_checkpoints_hold_no_traits() -> None:
    net = normswap.convert(small(), example_input=X)
    must_be_alike(net, normswap.plan_of(net).inputs, {}, "here")
