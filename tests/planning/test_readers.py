"""Convolutions that something else reads, runs or holds stay plain; what leaves and what runs is what it was."""

import copy
import ctypes
import functools
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normswap
from normswap.networks.network import Network
from normswap.tracing.forward import trace

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Base(nn.Module):
    """A convolution and its norm; `keep` may hold them once more, `run` runs them."""

    def __init__(self, keep: Callable[[Any], None], run: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.bn, self.other = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(3, 16, 3)
        self.register_buffer("queue", torch.zeros(4, 16))
        self.run = run
        keep(self)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


class Training(Base):
    def forward(self, x: Tensor) -> Any:
        h = self.conv(x)
        return (self.bn(h), h) if self.training else self.bn(h)


class Holder:
    def __init__(self, **fields: Any) -> None:
        vars(self).update(fields)


class InTraining(Base):
    """Runs the norm, and in train mode something else first."""

    def forward(self, x: Tensor) -> Any:
        if self.training:
            self.run(self, x)
        return self.bn(self.conv(x))


def nothing(net: Any) -> None:
    del net


def conv_of(net: nn.Module) -> Any:
    return normswap.inspect(net, example_input=X).convs[0]


def through(read: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], Any]:
    """Run the convolution, have `read` do something with its output, and run the norm on it."""

    def run(net: Any, x: Tensor) -> Any:
        h = net.conv(x)
        found = read(net, h)
        return net.bn(h) if found is None else (net.bn(h), found)

    return run


def after(change: Callable[[Any, Tensor, Tensor], Tensor]) -> Callable[[Any, Tensor], Any]:
    """Run the norm on what `change` makes of the convolution's output and of another's."""
    return lambda net, x: net.bn(change(net, net.conv(x), net.other(x)))


def times_halves(net: Any, h: Tensor, o: Tensor) -> Tensor:
    a, b = h.repeat(1, 2, 1, 1).chunk(2, 1)
    return a * b


def in_a_thread(function: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, h).result()


def filled(h: Tensor, value: Any = 1) -> Tensor:
    h[..., 0].fill_(value)
    return h


@torch.library.custom_op("normswap_tests::mul", mutates_args=())
def clipped(h: Tensor, factor: float) -> Tensor:
    """An operator with the name of one of torch's that does something else."""
    return factor * h.clamp(-1, 1)


@clipped.register_fake
def _(h: Tensor, factor: float) -> Tensor:
    return torch.empty_like(h)


SEEN: list[Tensor] = []
READERS: dict[str, Callable[[Any, Tensor], Any]] = {
    "attribute": through(lambda net, h: setattr(net, "kept", h)),
    "list elsewhere": through(lambda net, h: SEEN.append(h.detach())),
    "buffer": through(lambda net, h: net.queue[:2].copy_(h.mean((2, 3)))[:0].sum()),
    "object": through(lambda net, h: Holder(inner=Holder(h=h))),
    "iterator": through(lambda net, h: iter([h])),
    "generator": through(lambda net, h: (item for item in [h])),
    "list": through(lambda net, h: float(np.tanh(h.tolist()).sum())),
    "dlpack": through(lambda net, h: float(np.from_dlpack(h).sum())),
    "address": through(lambda net, h: ctypes.c_void_p(h.data_ptr())),
    "operator of another's": after(lambda net, h, o: clipped(h, 2.0)),
    "numpy": through(lambda net, h: h.detach().numpy().copy()),
    "weight": through(lambda net, h: net.conv.weight),
    "weight, detached": through(lambda net, h: Holder(w=net.conv.weight.detach())),
    "weight kept": through(lambda net, h: setattr(net, "kept", [net.conv.weight.detach().flatten()])),
    "weight as an input": through(lambda net, h: F.conv2d(net.conv.weight, h[:, :3, :3, :3]).sum() * 0),
    "weight among parameters": through(lambda net, h: F.conv2d(X.to(h), net.conv._parameters["weight"]) * 0),
    "a parameter made of it": through(lambda net, h: nn.Parameter(h).tanh().mean()),
    "another thread": through(lambda net, h: in_a_thread(torch.tanh, h).mean()),
    "weight in numpy": lambda net, x: (h := net.bn(net.conv(x))) + float(net.conv.weight.detach().numpy().std()) * h,
    "rounding division": after(lambda net, h, o: torch.div(h, 0.1, rounding_mode="floor")),
    "padded with ones": after(lambda net, h, o: F.pad(h, (1, 1), value=1.0)),
    "filled with ones": after(lambda net, h, o: filled(h)),
    "filled with a tensor": after(lambda net, h, o: filled(h, torch.tensor(1.0))),
    "noise": after(lambda net, h, o: h + torch.randn_like(h)),
    "position": after(lambda net, h, o: h + torch.arange(6.0)),
    "position kept as a buffer": after(lambda net, h, o: h + net.queue.flatten()[:36].view(6, 6)),
    "product with itself": after(lambda net, h, o: h * h),
    "product of halves": after(times_halves),
    "gate": after(lambda net, h, o: h * torch.sigmoid(o)),
    "divisor": after(lambda net, h, o: 1 / (h + 3)),
    "divisor of another": after(lambda net, h, o: o / h),
    "comparison": after(lambda net, h, o: (h > 0).float()),
    "whole numbers": after(lambda net, h, o: h.long().float()),
    "index": after(lambda net, h, o: net.queue.flatten()[h.long() % 4]),
    "gather": after(lambda net, h, o: torch.gather(o, 2, h.long() % 4)),
    "grid": after(lambda net, h, o: F.grid_sample(o, h[:, :2].permute(0, 2, 3, 1), align_corners=False)),
    "mask": after(lambda net, h, o: torch.where(h > 0, h, 0)),
    "blend": after(lambda net, h, o: torch.lerp(o, o, h)),
    "scores": after(lambda net, h, o: (h.flatten(2) @ h.flatten(2).mT)[..., None] * h.mean()),
    "affine part": lambda net, x: (
        net.bn(F.group_norm(net.other(x), 4, net.conv(x).mean((0, 2, 3)))) + net.bn(net.conv(x))
    ),
}


@pytest.mark.parametrize("run", READERS.values(), ids=READERS)
def test_what_else_reads_it_keeps_it_plain(run: Callable[[Any, Tensor], Any]) -> None:
    entry = conv_of(Base(nothing, run).eval())
    assert not entry.changes
    assert entry.reason


class Keeps(nn.Module):
    """Holds on to what it is given in train mode."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.kept = x
        return x


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return noisy(x, self.training)


def noisy(x: Tensor, yes: bool) -> Tensor:
    return x + torch.randn_like(x) if yes else x


def noise_of(net: Any, x: Tensor) -> Tensor:
    return x + torch.randn_like(x) if net.training else x


class Told:
    """Adds noise where it is told to, and is no module."""

    def __call__(self, x: Tensor, yes: bool) -> Tensor:
        return noisy(x, yes)

    def apply(self, x: Tensor, yes: bool) -> Tensor:
        return self(x, yes)


class ToldFunction(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, yes: bool) -> Tensor:
        return x + torch.randn_like(x) if yes else x.clone()


class Mixed:
    """Adds noise in train mode, as a base of a network that is no module itself."""

    training: bool

    def noisy(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x) if self.training else x


class MixedNet(Mixed, Base):
    pass


TOLD = Told()


class Computed(Base):
    """Has attributes that are computed, in ways that no code names."""

    class Flag:
        def __get__(self, net: Any, _kind: Any) -> bool:
            return bool(net.training)

    described = Flag()

    def __getattr__(self, name: str) -> Any:
        return self.training if name == "asked" else super().__getattr__(name)


class Watching:
    """Tells of the mode in a ``with`` and a loop."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def __enter__(self) -> bool:
        return self.net.training

    def __exit__(self, *_: object) -> None:
        pass

    def __iter__(self) -> Any:
        return iter([True] if self.net.training else [])


def entered(net: Any) -> bool:
    with Watching(net) as yes:
        return yes


def flagged(net: Any) -> None:
    net.flag = False
    net.register_forward_pre_hook(lambda own, args: setattr(own, "flag", own.training))


class SetsFlag(Base):
    more = False

    def train(self, mode: bool = True) -> Any:
        self.more = mode
        return super().train(mode)

    @property
    def trains(self) -> bool:
        return self.training


def hooked(net: Any) -> None:
    net.conv.register_forward_hook(lambda conv, args, y: noise_of(conv, y))


BY_MODE: dict[str, Callable[[], nn.Module]] = {
    "a layer without children": lambda: Base(holding(Keeps()), lambda net, x: net.bn(net.layer(net.conv(x)))),
    "a layer that hands it on": lambda: Base(holding(Noise()), lambda net, x: net.bn(net.layer(net.conv(x)))),
    "a function that is told": lambda: Base(nothing, lambda net, x: net.bn(noisy(net.conv(x), net.training))),
    "a function that asks": lambda: Base(nothing, lambda net, x: net.bn(noise_of(net, net.conv(x)))),
    "a hook": lambda: Base(hooked, lambda net, x: net.bn(net.conv(x))),
    "by its name": lambda: Base(nothing, lambda net, x: both(net, x, getattr(net, "training"))),  # noqa: B009
    "of any module": lambda: Base(nothing, lambda net, x: both(net, x, any(m.training for m in net.modules()))),
    "a flag that is set with it": lambda: SetsFlag(nothing, lambda net, x: both(net, x, net.more)),
    "a flag that a hook sets": lambda: Base(flagged, lambda net, x: both(net, x, net.flag)),
    "a number made of it": lambda: Base(nothing, lambda net, x: [net.bn(h := net.conv(x)), h][: 1 + int(net.training)]),
    "a descriptor": lambda: Computed(nothing, lambda net, x: both(net, x, net.described)),
    "an attribute that is not there": lambda: Computed(nothing, lambda net, x: both(net, x, net.asked)),
    "a context": lambda: Base(nothing, lambda net, x: both(net, x, entered(net))),
    "a loop": lambda: Base(nothing, lambda net, x: both(net, x, len([*Watching(net)]) > 0)),
    "a property": lambda: SetsFlag(nothing, lambda net, x: both(net, x, net.trains)),
    "an object": lambda: Base(holding(Told()), lambda net, x: net.bn(net.layer(net.conv(x), net.training))),
    "an object's method": lambda: Base(
        holding([Told()]), lambda net, x: net.bn(net.layer[0].apply(net.conv(x), net.training))
    ),
    "an object of the file": lambda: Base(nothing, lambda net, x: net.bn(TOLD(net.conv(x), net.training))),
    "an object that is made": lambda: Base(nothing, lambda net, x: net.bn(Told()(net.conv(x), net.training))),
    "a function in a list": lambda: Base(
        holding([noisy]), lambda net, x: net.bn(net.layer[0](net.conv(x), net.training))
    ),
    "a partial in a dict": lambda: Base(
        holding({0: functools.partial(noisy)}), lambda net, x: net.bn(net.layer[0](net.conv(x), net.training))
    ),
    "a default": lambda: Base(nothing, lambda net, x, add=noisy: net.bn(add(net.conv(x), net.training))),
    "a function of autograd": lambda: Base(
        nothing, lambda net, x: net.bn(ToldFunction.apply(net.conv(x), net.training))
    ),
    "a base that is no module": lambda: MixedNet(nothing, lambda net, x: net.bn(net.noisy(net.conv(x)))),
    "dropout that adds": lambda: Base(holding(nn.AlphaDropout()), lambda net, x: net.bn(net.layer(net.conv(x)))),
    "dropout of channels that adds": lambda: Base(
        nothing, lambda net, x: net.bn(F.feature_alpha_dropout(net.conv(x), 0.5, net.training))
    ),
}


def holding(layer: Any) -> Callable[[Any], None]:
    return lambda net: setattr(net, "layer", layer)


def both(net: Any, x: Tensor, yes: bool) -> Any:
    h = net.conv(x)
    return (net.bn(h), h) if yes else net.bn(h)


@pytest.mark.parametrize("how", BY_MODE)
def test_whoever_asks_for_the_mode_and_however_what_it_reads_in_train_mode_is_seen(how: str) -> None:
    net = BY_MODE[how]()
    assert conv_of(net).reason in ("its output leaves the network", "its output is read by <add>")


def test_what_leaves_in_train_mode_alone() -> None:
    assert conv_of(Training(nothing, through(nothing)).eval()).reason == "its output leaves the network"


class Penalized(nn.Conv2d):
    """Keeps a penalty on its weight in train mode."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.penalty = self.weight.abs().sum()
        return super().forward(x)


def test_a_convolution_that_reads_its_weight_in_train_mode_alone_stays_plain() -> None:
    entry = conv_of(nn.Sequential(Penalized(3, 16, 3), nn.BatchNorm2d(16)).eval())
    assert (entry.changes, entry.reason) == (False, "its weight is also read by abs")


IN_TRAINING: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "a penalty": (lambda net, x: setattr(net, "loss", net.bn.weight.abs().sum()), "its weight is also read by abs"),
    "a constraint": (lambda net, x: net.bn.weight.data.clamp_(0, 1), "its weight is also read by clamp"),
    "its statistics": (lambda net, x: setattr(net, "loss", net.bn.running_mean.norm()), "asks for its running_mean"),
}


@pytest.mark.parametrize(("run", "reason"), IN_TRAINING.values(), ids=IN_TRAINING)
def test_a_norm_that_is_read_in_train_mode_alone_is_left(run: Callable[[Any, Tensor], Any], reason: str) -> None:
    with pytest.raises(normswap.NothingToConvert, match=f"bn: .*{reason}"):
        normswap.convert(InTraining(nothing, run).eval(), example_input=X)


def test_a_norm_that_is_asked_in_train_mode_and_runs_in_eval_mode_is_left() -> None:
    class Instead(Base):
        def forward(self, x: Tensor) -> Any:
            h = self.conv(x)
            return h / self.bn.running_var.sqrt()[:, None, None] if self.training else self.bn(h)

    with pytest.raises(normswap.NothingToConvert, match="bn: code outside of it asks for its running_var"):
        normswap.convert(Instead(nothing, nothing).eval(), example_input=X)


def test_groups_fit_what_a_norm_sees_in_train_mode_alone() -> None:
    net = InTraining(nothing, lambda net, x: net.bn(net.conv(x[..., :3, :3])))
    norm = normswap.inspect(net.eval(), example_input=X).norms[0]
    assert (norm.shape, norm.groups) == ((2, 16, 1, 1), 1)


NUMBERS: dict[str, Callable[[Tensor], Tensor]] = {
    "tensor": lambda y: torch.tensor([2.0], device=y.device),
    "as_tensor": lambda y: torch.as_tensor([2.0], dtype=y.dtype, device=y.device),
    "new_tensor": lambda y: y.new_tensor([2.0]),
}


@pytest.mark.parametrize("how", NUMBERS)
def test_a_tensor_made_of_numbers_where_no_operator_is_seen_is_a_constant(how: str) -> None:
    def run(net: Any, x: Tensor) -> Tensor:
        y: Tensor = net.bn(net.conv(x))
        return y * NUMBERS[how](y)

    assert conv_of(Base(nothing, run)).changes


class Head(Base):
    """Runs one more convolution, without a norm, in train mode alone."""

    def forward(self, x: Tensor) -> Any:
        y = self.bn(self.conv(x))
        return (y, self.other(x)) if self.training else y


def test_a_head_without_norms_that_runs_in_train_mode_alone_is_converted_around() -> None:
    net = Head(nothing, nothing).eval()
    converted = normswap.convert(net, example_input=X)
    assert normswap.plan_of(converted).convs[1].reason == "its output leaves the network"
    assert normswap.check(converted, net)


WAYS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "by mode": lambda net, x: net.conv(x) if net.training else net.other(x),
    "by a value": lambda net, x: net.conv(x) if x.sum() > 1e9 else net.other(x),
    "by a number": lambda net, x: [net.other, net.conv][int(x.sum() > 1e9)](x),
    "by equality": lambda net, x: net.conv(x) if torch.equal(x, x.flip(0)) else net.other(x),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_norm_that_is_fed_by_one_of_two_convolutions_takes_the_scales_of_neither(way: str) -> None:
    net = Base(nothing, lambda net, x: net.bn(WAYS[way](net, x)))
    net.bn.running_mean.normal_(generator=torch.Generator().manual_seed(0))
    plan = normswap.inspect(net.eval(), example_input=X, batches=[X])
    assert (plan.norms[0].fed_by, plan.scales) == (("other", "conv") if way == "by mode" else ("conv", "other"), {})
    assert [entry.changes for entry in plan.convs] == [True, True]


@pytest.mark.parametrize("above", [True, False])
def test_a_reader_on_either_way_of_a_value_keeps_a_convolution_plain(above: bool) -> None:
    def run(net: Any, x: Tensor) -> Tensor:
        h = net.conv(x)
        y: Tensor = net.bn(h)
        return y + h.sigmoid() if bool(x.sum() > 0) == above else y

    entry = conv_of(Base(nothing, run).eval())
    assert (entry.changes, entry.reason) == (False, "its output is read by <sigmoid>")


class Exits(Base):
    """Leaves by values before its second norm."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(self.conv(x))
        return y if y.max() > 1e9 else self.late_bn(self.other(y[:, :3]))


def test_layers_behind_an_exit_by_values_are_reached() -> None:
    net = Exits(lambda net: setattr(net, "late_bn", nn.BatchNorm2d(16)), nothing).eval()
    converted = normswap.convert(net, example_input=X)
    assert [entry.changes for entry in normswap.plan_of(converted).entries] == [True] * 4
    assert normswap.check(converted, net)


class Dense(nn.Module):
    """A convolution that more norms read than a plan lists, and in train mode an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norms = nn.Conv2d(3, 16, 3), nn.ModuleList(nn.BatchNorm2d(16) for _ in range(12))

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        y: Tensor = sum(norm(h) for norm in self.norms)
        return y + h.sigmoid() if self.training else y


def test_a_reader_in_train_mode_is_seen_behind_many_others() -> None:
    entry = conv_of(Dense().eval())
    assert (entry.changes, entry.reason) == (False, "its output is read by <sigmoid>")


LINEAR: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "as it is": lambda net, h, o: h,
    "times a parameter": lambda net, h, o: h * net.queue[0, 0] / 3 - 1,
    "sum": lambda net, h, o: h + o,
    "pooled": lambda net, h, o: F.max_pool2d(F.avg_pool2d(h, 2), 2),
    "plus a channel's own number": lambda net, h, o: h + net.queue[0, :, None, None] + 1e-5,
    "plus learned positions": lambda net, h, o: h + net.other.weight.flatten()[:36].view(6, 6),
    "padded with zeros": lambda net, h, o: F.pad(h, (1, 1)),
    "padded for a maximum": lambda net, h, o: F.max_pool2d(F.pad(h, (1, 1, 1, 1), value=-torch.inf), 3),
    "divided": lambda net, h, o: torch.div(h, 3),
    "resized": lambda net, h, o: F.interpolate(h, scale_factor=2.0, mode="bilinear"),
    "halves written": lambda net, h, o: write_halves(h),
    "rows by constant index": lambda net, h, o: h[:, torch.arange(15, -1, -1)],
}


def write_halves(h: Tensor) -> Tensor:
    made = torch.zeros(h.shape)
    made[:, :8], made[:, 8:] = h[:, 8:], h[:, :8]
    return made


@pytest.mark.parametrize("change", LINEAR.values(), ids=LINEAR)
def test_linear_paths_to_a_norm_are_standardized(change: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
    entry = conv_of(Base(nothing, after(change)).eval())
    assert entry.changes, entry.reason


def hold(**made: Callable[[Any], Any]) -> Callable[[Any], None]:
    def keep(net: Any) -> None:
        for key, value in made.items():
            object.__setattr__(net, key, value(net))

    return keep


HELD: dict[str, tuple[Callable[[Any], None], Callable[[Any, Tensor], Any], bool]] = {
    "list": (hold(ops=lambda net: [net.conv]), lambda net, x: net.bn(net.ops[0](x)), True),
    "private list": (hold(_ops=lambda net: [net.conv]), lambda net, x: net.bn(net._ops[0](x)), True),
    "nested dict": (
        hold(ops=lambda net: {"a": {"b": [net.conv]}}), lambda net, x: net.bn(net.ops["a"]["b"][0](x)), True,
    ),
    "attribute": (hold(op=lambda net: net.conv), lambda net, x: net.bn(net.op(x)), True),
    "wrapper in a tuple": (
        hold(ops=lambda net: (nn.Sequential(net.conv),)), lambda net, x: net.bn(net.ops[0](x)), True,
    ),
    "tuple": (hold(ops=lambda net: (net.conv,)), lambda net, x: net.bn(net.ops[0](x)), False),
    "partial": (hold(op=lambda net: functools.partial(net.conv)), lambda net, x: net.bn(net.op(x)), False),
    "bound method": (hold(op=lambda net: net.conv.forward), lambda net, x: net.bn(net.op(x)), False),
    "closure": (hold(op=lambda net: lambda x, conv=net.conv: conv(x)), lambda net, x: net.bn(net.op(x)), False),
    "object": (hold(op=lambda net: Holder(conv=net.conv)), lambda net, x: net.bn(net.op.conv(x)), False),
    "held, not run": (hold(op=lambda net: (net.conv,)), lambda net, x: net.bn(net.conv(x)), False),
    "its own forward patched": (
        lambda net: setattr(net.conv, "forward", net.conv.forward), lambda net, x: net.bn(net.conv(x)), False,
    ),
    "weight in a partial": (
        hold(op=lambda net: functools.partial(F.conv2d, weight=net.conv.weight)), lambda net, x: net.bn(net.conv(x)),
        False,
    ),
    "weight in a closure": (
        hold(op=lambda net: lambda x, w=net.conv.weight: F.conv2d(x, w)),
        lambda net, x: net.bn(net.conv(x)) + net.op(x).mean() * 0, False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "in place"])
@pytest.mark.parametrize(("keep", "run", "replaced"), HELD.values(), ids=HELD)
def test_what_runs_is_what_the_plan_says(
    keep: Callable[[Any], None], run: Callable[[Any, Tensor], Any], replaced: bool, inplace: bool
) -> None:
    net = Base(keep, run).eval()
    nn.init.normal_(net.bn.running_mean)
    new = normswap.convert(net, example_input=X, inplace=inplace)
    entry = normswap.plan_of(new).convs[0]
    assert entry.changes is replaced, entry.reason
    if not replaced:
        assert type(new.conv) is nn.Conv2d
    if replaced:
        with torch.no_grad():
            new.conv.weight.add_(torch.randn_like(new.conv.weight))
        kernel = new.conv.standardized_weight()
        torch.testing.assert_close(new(X), new.bn(torch.conv2d(X, kernel, new.conv.bias)), rtol=1e-4, atol=1e-4)


def test_a_norm_in_a_tuple_is_refused_before_anything_changes() -> None:
    net = Base(hold(ops=lambda net: (net.bn,)), lambda net, x: net.ops[0](net.conv(x))).eval()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(normswap.NothingToConvert, match=r"ops \(a tuple\) holds it, too, where nothing can take its"):
        normswap.convert(net, example_input=X, inplace=True)
    assert type(net.bn) is nn.BatchNorm2d
    assert all(value.equal(before[key]) for key, value in net.state_dict().items())


def test_a_plan_is_not_applied_to_a_network_that_holds_more() -> None:
    plan = normswap.inspect(Base(nothing, lambda net, x: net.bn(net.conv(x))), example_input=X)
    with pytest.raises(normswap.PlanMismatch, match=r"conv: ops \(a tuple\) holds it, too"):
        normswap.apply(Base(hold(ops=lambda net: (net.conv,)), lambda net, x: net.bn(net.conv(x))), plan)


def test_check_sees_a_layer_that_was_left_behind() -> None:
    net = Base(nothing, lambda net, x: net.bn(net.conv(x))).eval()
    new = normswap.convert(net, example_input=X)
    old = nn.Conv2d(3, 16, 3)
    old.weight = new.conv.weight
    object.__setattr__(new, "ops", (old,))
    assert "still runs conv as it was, a Conv2d" in str(normswap.check(new, net))


class Beside(nn.Module):
    """A norm of another kind that reads the convolution, too, and sees the sizes of its filters."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.bn, self.norm = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), norm

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        return self.bn(h) + self.norm(h)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "norm", [nn.GroupNorm(1, 16), nn.InstanceNorm2d(16, track_running_stats=True)], ids=lambda n: type(n).__name__
)
def test_beside_norms_of_another_kind_trained_filters_keep_their_sizes(norm: nn.Module) -> None:
    net = Beside(norm).eval()
    assert normswap.inspect(net, example_input=X, ws="standard").convs[0].ws == "standard"
    nn.init.normal_(net.bn.running_mean)
    entry = normswap.inspect(net, example_input=X, ws="standard").convs[0]
    assert entry.ws == "adaptive"
    assert "would see that the standard form scales each filter" in entry.reason


class Affine(nn.Module):
    """Two layers whose norms' own tensors something else holds, or computes with."""

    def __init__(self, share: Callable[[Any], None], read: Callable[[Any], Any]) -> None:
        super().__init__()
        self.a, self.b, self.bn = nn.Conv2d(3, 16, 3), nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
        self.bn2, self.read = nn.BatchNorm2d(16), read
        share(self)

    def forward(self, x: Tensor) -> Any:
        return self.bn(self.a(x)) + self.bn2(self.b(x)) + self.read(self)


AFFINE: dict[str, tuple[Callable[[Any], None], Callable[[Any], Any], str]] = {
    "one weight for two norms": (lambda net: setattr(net.bn2, "weight", net.bn.weight), lambda net: 0, "its weight"),
    "one bias for two norms": (lambda net: setattr(net.bn2, "bias", net.bn.bias), lambda net: 0, "its bias"),
    "a convolution's bias": (lambda net: setattr(net.a, "bias", net.bn.bias), lambda net: 0, "its bias"),
    "attention by weights": (nothing, lambda net: (net.bn.weight.data.abs() / 3)[:, None, None], "also read by abs"),
    "a penalty": (nothing, lambda net: net.bn.weight.square().sum(), "its weight is also read by"),
}


@pytest.mark.parametrize(("share", "read", "reason"), AFFINE.values(), ids=AFFINE)
def test_affine_values_that_others_use_are_not_matched(
    share: Callable[[Any], None], read: Callable[[Any], Any], reason: str
) -> None:
    net = Affine(share, read).eval()
    nn.init.normal_(net.bn.running_mean)
    nn.init.normal_(net.bn2.running_mean)
    with pytest.raises(normswap.NormswapError, match=f"bn: .*{reason}"):
        normswap.convert(net, example_input=X)


class Tied(nn.Module):
    """A decoder that holds the encoder's kernel, in one of several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv, self.bn, self.bn2 = (
            nn.Conv2d(16, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.BatchNorm2d(16),
        )
        self.dec: nn.Module = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        if how == "other kind":
            self.dec = nn.ConvTranspose2d(16, 16, 3, padding=1, bias=False)
        if how == "other name":
            self.dec = Decoder(self.conv.weight)
        elif how == "memory":
            self.dec = Decoder(nn.Parameter(self.conv.weight.data))
        else:
            self.dec.weight = self.conv.weight
        if how == "one trained":
            nn.init.normal_(self.bn2.running_mean)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.dec(self.bn(self.conv(x)).relu()))


class Decoder(nn.Module):
    def __init__(self, kernel: nn.Parameter) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, self.kernel, padding=1)


@pytest.mark.parametrize(
    ("how", "forms"),
    [
        ("other kind", {None}), ("other name", {None}), ("memory", {None}), ("alike", {"standard"}),
        ("one trained", {"adaptive"}),
    ],
)  # fmt: skip
def test_tied_kernels_are_treated_alike_or_left(how: str, forms: set[str | None]) -> None:
    torch.manual_seed(0)
    net, x = Tied(how).eval(), torch.randn(2, 16, 8, 8)
    plan = normswap.inspect(net, example_input=x)
    assert {entry.ws for entry in plan.convs} == forms
    assert {entry.eps is None for entry in plan.convs} == {forms == {None}}


def test_a_function_that_knows_the_registered_modules_holds_no_more_than_they_do() -> None:
    net = Base(hold(op=lambda net: lambda x, own=net._modules: own["conv"](x)), lambda net, x: net.bn(net.conv(x)))
    compiled = nn.Sequential(torch.compile(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), backend="eager"))
    for model in (net.eval(), compiled.eval()):
        assert conv_of(model).changes


GLOBAL: dict[str, Any] = {}
"""What networks keep in their file."""

PAST = {
    "weak reference": (lambda net: vars(net).update(ref=weakref.ref(net.conv)), lambda net: net.ref()),
    "global": (lambda net: GLOBAL.update(conv=net.conv), lambda net: GLOBAL["conv"]),
    "class": (lambda net: setattr(Holder, "conv", net.conv), lambda net: Holder.conv),  # type: ignore[attr-defined]
}


@pytest.mark.parametrize(("keep", "found"), PAST.values(), ids=PAST)
def test_a_layer_that_is_found_past_the_modules_stays_plain(keep: Any, found: Callable[[Any], nn.Module]) -> None:
    """No replacement takes the place of what a global holds, and a copy goes on with the original's."""
    net = Base(keep, lambda net, x: net.bn(net.conv(x)) + net.bn(found(net)(x.flip(-1)))).eval()
    plan = normswap.inspect(net, example_input=X)
    (entry, *_) = [own for own in plan.convs if own.name == "conv"]
    assert entry.reason == "its weight is also read by code that finds it past the network's modules"
    assert any(line.startswith("conv.bias is found past the network's modules") for line in plan.warnings)
    for inplace in (False, True):
        result = normswap.convert(net, example_input=X, inplace=inplace)
        assert type(found(net)) is type(result.conv) is nn.Conv2d


WITH_GRADIENTS = {
    "enabled": lambda net, x: (net.bn(net.conv(x)), net.conv(x)) if torch.is_grad_enabled() else net.bn(net.conv(x)),
    "wanted": lambda net, x: penalized(net, net.conv(x)),
    "of a result": lambda net, x: net.bn(h) if (h := net.conv(x)).is_leaf else (net.bn(h), h),
}


def penalized(net: Any, h: Tensor) -> Any:
    return (net.bn(h), h.square().mean()) if h.requires_grad else net.bn(h)


@pytest.mark.parametrize("run", WITH_GRADIENTS.values(), ids=WITH_GRADIENTS)
def test_what_reads_a_convolution_with_gradients_alone_is_seen(run: Callable[[Any, Tensor], Any]) -> None:
    """A trace that runs without them had its filters standardized and scaled, and training got other values."""
    net = Base(nothing, run).eval()
    nn.init.uniform_(net.bn.running_var, 0.5, 2)
    wanted = net(X)[1]
    result = normswap.convert(net, example_input=X)
    assert type(result.conv) is nn.Conv2d
    assert torch.equal(result(X)[1], wanted)


def clipping(net: Any, h: Tensor, yes: bool) -> Tensor:
    if yes:
        h.register_hook(lambda gradient: gradient.clamp(-1, 1))
    return net.bn(h)  # type: ignore[no-any-return]


def clipping_after(net: Any) -> None:
    net.conv.register_full_backward_hook(lambda conv, inputs, outputs: inputs)


def clipping_before(net: Any) -> None:
    net.conv.register_full_backward_pre_hook(lambda conv, outputs: tuple(gradient.clamp(-1, 1) for gradient in outputs))


GRADIENT_HOOKS: dict[str, Callable[[], Base]] = {
    "of a tensor": lambda: Base(nothing, lambda net, x: clipping(net, h := net.conv(x), h.requires_grad)),
    "of a tensor in train mode": lambda: Base(nothing, lambda net, x: clipping(net, net.conv(x), net.training)),
    "of a layer": lambda: Base(clipping_after, lambda net, x: net.bn(net.conv(x))),
    "before a layer": lambda: Base(clipping_before, lambda net, x: net.bn(net.conv(x))),
}


@pytest.mark.parametrize("build", GRADIENT_HOOKS.values(), ids=GRADIENT_HOOKS)
def test_a_hook_that_gets_gradients_of_a_convolution_gets_them_as_they_were(build: Callable[[], Base]) -> None:
    net = build().eval()
    nn.init.uniform_(net.bn.running_var, 0.5, 2)
    plan = normswap.inspect(net, example_input=X)
    assert plan.norms[0].not_equalized
    assert not plan.scales


ON_THE_CPU = {
    "type": lambda net, x: net.conv.weight.device.type == "cpu",
    "is_cpu": lambda net, x: x.is_cpu,
    "is_meta": lambda net, x: not x.is_meta,
    "comparison": lambda net, x: x.device == torch.device("cpu"),
    "memory": lambda net, x: x.data_ptr() != 0,
}


@pytest.mark.parametrize("here", ON_THE_CPU.values(), ids=ON_THE_CPU)
def test_what_reads_a_convolution_where_the_network_is_is_seen(here: Callable[[Any, Tensor], bool]) -> None:
    """A pass without data is on another device: code that asks went the other way, and filters were scaled."""
    net = Base(nothing, lambda net, x: (net.bn(h := net.conv(x)), h) if here(net, x) else net.bn(net.conv(x))).eval()
    nn.init.uniform_(net.bn.running_var, 0.5, 2)
    result = normswap.convert(net, example_input=X)
    assert type(result.conv) is nn.Conv2d
    assert torch.equal(result(X)[1], net(X)[1])


def test_a_device_that_is_handed_on_or_compared_with_another_s_takes_no_pass_with_data() -> None:
    def run(net: Any, x: Tensor) -> Tensor:
        assert x.device == net.queue.device
        return net.bn(net.conv(x) * torch.ones((), device=x.device)) if x.device.index is None else x  # type: ignore[no-any-return]

    network = Network(Base(nothing, run).eval())
    assert not trace(network, X).asked_where


def test_a_reader_in_the_networks_own_code_has_a_name() -> None:
    """A fixed filter behind a convolution, as it blurs before it skips positions."""
    blur = torch.ones(16, 1, 3, 3) / 9
    net = Base(nothing, lambda net, x: net.bn(F.conv2d(net.conv(x), blur.to(x.device), groups=16))).eval()
    assert conv_named(net, "conv").reason == "its output is read by the code of the network itself"


def conv_named(net: nn.Module, name: str) -> Any:
    return next(entry for entry in normswap.inspect(net, example_input=X).convs if entry.name == name)
