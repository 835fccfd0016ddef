"""Norms of other classes than torch's: replaced where numbers show BatchNorm, refused where they do not."""

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nets import Direct, conv
from refusals import described
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d, SyncBatchNormAct, convert_sync_batchnorm
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d

import normswap
from normswap.networks.probing import departure

Forward = Callable[[Any, Tensor], Tensor]
EXACTLY = nn.BatchNorm2d.forward


def subclass(forward: Forward, base: type[nn.Module] = nn.BatchNorm2d, **attributes: Any) -> nn.Module:
    norm = type("Own", (base,), {"forward": forward})(8)
    for key, value in attributes.items():
        setattr(norm, key, value)
    return norm


def by_hand(gamma: Callable[[Tensor], Tensor]) -> Forward:
    return lambda s, x: F.batch_norm(x, s.running_mean, s.running_var, gamma(s.weight), s.bias, s.training, 0.1, s.eps)


def after(change: Callable[[Any, Tensor, Tensor], Tensor]) -> Forward:
    return lambda s, x: change(s, EXACTLY(s, x), x)


def by_the_batch(self: Any, x: Tensor) -> Tensor:
    return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True, 0.1, self.eps)


def zeroed(_: Any, y: Tensor, x: Tensor) -> Tensor:
    return torch.cat([y[:, :-1], torch.zeros_like(y[:, -1:])], 1)


def ghosts(self: Any, x: Tensor) -> Tensor:
    return torch.cat([EXACTLY(self, part) for part in x.chunk(2)]) if self.training else EXACTLY(self, x)


def late(self: Any, x: Tensor) -> Tensor:
    y = EXACTLY(self, x)
    return 2 * y if self.training and self.num_batches_tracked > 100 else y


def late_by_attribute(self: Any, x: Tensor) -> Tensor:
    self.steps = getattr(self, "steps", 0) + self.training
    return EXACTLY(self, x) * (2 if self.steps > 1000 else 1)


def after_update(self: Any, x: Tensor) -> Tensor:
    y = EXACTLY(self, x)
    if not self.training:
        return y
    return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps)


def coin(_: Any, y: Tensor, x: Tensor) -> Tensor:
    return 2 * y if random.random() < 1e-6 else y


def numpy_coin(_: Any, y: Tensor, x: Tensor) -> Tensor:
    return 2 * y if np.random.rand() < 1e-6 else y


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return -gradients[0]


def late_by_key(self: Any, x: Tensor) -> Tensor:
    self.seen["batches"] = self.seen.get("batches", 0) + self.training
    return EXACTLY(self, x) * (2 if self.seen["batches"] > 1000 else 1)


def late_by_float(self: Any, x: Tensor) -> Tensor:
    self.steps = getattr(self, "steps", 0.0) + float(self.training)
    return EXACTLY(self, x) * (2 if self.steps > 1000 else 1)


def large_ghosts(self: Any, x: Tensor) -> Tensor:
    parts = x.split(128) if self.training else (x,)
    return torch.cat([EXACTLY(self, part) for part in parts])


def clipping(self: Any, x: Tensor) -> Tensor:
    self.weight.data.clamp_(0.1, 1)
    return EXACTLY(self, x)


def in_place(self: Any, x: Tensor) -> Tensor:
    y = EXACTLY(self, x)
    x.zero_()
    return y


def masked(self: Any, y: Tensor, x: Tensor) -> Tensor:
    return y * self.mask[:, None, None]


class Duck(nn.Module):
    def __init__(self, rule: Callable[..., Tensor]) -> None:
        super().__init__()
        self.rule = rule
        self.weight, self.bias = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))
        self.register_buffer("running_mean", torch.zeros(8))
        self.register_buffer("running_var", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.rule(x, *(t.view(-1, 1, 1) for t in (self.weight, self.bias, self.running_mean, self.running_var)))


OFF = "in eval mode its output is"
TRAIN = "in train mode its output is"
DRAWS = "mode its forward draws random numbers"
DEPARTING: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "gamma is 1 + weight": (lambda: subclass(by_hand(lambda w: 1 + w)), OFF),
    "gamma is positive": (lambda: subclass(by_hand(torch.abs)), OFF),
    "clips its gamma": (lambda: subclass(clipping), OFF),
    "batch statistics in eval mode": (lambda: subclass(by_the_batch), "without mean and var"),
    "writes to its input": (lambda: subclass(in_place), "in eval mode it writes to its input"),
    "flips": (lambda: subclass(after(lambda s, y, x: y.flip(-1))), OFF),
    "transposes": (lambda: subclass(after(lambda s, y, x: y.mT.reshape_as(y))), OFF),
    "rolls channels": (lambda: subclass(after(lambda s, y, x: y.roll(1, 1))), OFF),
    "zeroes one channel": (lambda: subclass(after(zeroed)), "also computes zeros_like"),
    "clamps": (lambda: subclass(after(lambda s, y, x: y.clamp(-20, 20))), "also computes clamp"),
    "adds its input": (lambda: subclass(after(lambda s, y, x: x + y)), "also computes add"),
    "doubles in train mode": (lambda: subclass(after(lambda s, y, x: y * (1 + s.training))), TRAIN),
    "clamps in train mode": (lambda: subclass(after(lambda s, y, x: y.clamp(-4, 4) if s.training else y)), TRAIN),
    "ghost batches": (lambda: subclass(ghosts), TRAIN),
    "other after a warm-up": (lambda: subclass(late), TRAIN),
    "other after a warm-up by an attribute": (lambda: subclass(late_by_attribute), TRAIN),
    "running statistics after their update": (lambda: subclass(after_update), TRAIN),
    "other after a warm-up by a key": (lambda: subclass(late_by_key, seen={}), TRAIN),
    "other after a warm-up by a float": (lambda: subclass(late_by_float), TRAIN),
    "ghosts of large batches": (lambda: subclass(large_ghosts), TRAIN),
    "one sample": (lambda: subclass(after(lambda s, y, x: y if len(x) > 1 else y.tanh())), OFF),
    "large maps": (lambda: subclass(after(lambda s, y, x: y if x.shape[-1] < 15 else 2 * y)), OFF),
    "doubles where gradients are": (
        lambda: subclass(after(lambda s, y, x: y * (1 + torch.is_grad_enabled()))),
        "also computes mul",
    ),
    "hands no gradient on": (lambda: subclass(lambda s, x: EXACTLY(s, x.detach())), "its gradient is off"),
    "does not train gamma": (lambda: subclass(by_hand(torch.detach)), "its gradient for its affine part is off"),
    "turns the gradient": (lambda: subclass(after(lambda s, y, x: Reversed.apply(y))), "its gradient is off"),
    "dropout": (lambda: subclass(after(lambda s, y, x: F.dropout2d(y, 0.01, s.training))), f"in train {DRAWS}"),
    "noise": (lambda: subclass(after(lambda s, y, x: y + 1e-6 * torch.randn_like(y))), f"in eval {DRAWS}"),
    "Python's coin": (lambda: subclass(after(coin)), f"in eval {DRAWS}"),
    "numpy's coin": (lambda: subclass(after(numpy_coin)), f"in eval {DRAWS}"),
    "another shape": (lambda: subclass(after(lambda s, y, x: y.mean((2, 3), True))), "it returns a tensor"),
    "no tensor": (lambda: subclass(after(lambda s, y, x: (y,))), "in eval mode it returns a tuple"),
    "an extra buffer": (lambda: with_mask(subclass(after(masked))), "also computes mul"),
    "a gate that is closed": (lambda: gated(0.0, lambda s, y, x: y + s.gate[0] * x), "also computes (mul|add)"),
    "a factor that is one": (lambda: gated(1.0, lambda s, y, x: y * s.gate[0]), "also computes mul"),
    "children that meet other shapes": (lambda: attentive(nn.Linear(8, 1)), "also computes mean"),
    "children that change the shape": (lambda: attentive(nn.AdaptiveAvgPool2d(1)), "also computes mean"),
    "duck: 2y + 3": (lambda: Duck(lambda x, w, b, m, v: 2 * ((x - m) * (v + 1e-5).rsqrt() * w + b) + 3), OFF),
    "duck: not centred": (lambda: Duck(lambda x, w, b, m, v: x * (v + 1e-5).rsqrt() * w + b + 0 * m), OFF),
    "duck: another eps": (lambda: Duck(lambda x, w, b, m, v: (x - m) * (v + 1e-3).rsqrt() * w + b), OFF),
    "duck: spread for variance": (lambda: Duck(lambda x, w, b, m, v: (x - m) / (v + 1e-5) * w + b), OFF),
}


def gated(value: float, change: Callable[[Any, Tensor, Tensor], Tensor]) -> nn.Module:
    """Return a norm that computes with a child's parameter, which at present changes nothing."""
    return subclass(after(change), gate=nn.ParameterList([nn.Parameter(torch.tensor(value))]))


def attentive(child: nn.Module) -> nn.Module:
    """Return a norm of which a child weighs the output by the input's means."""

    def weigh(s: Any, y: Tensor, x: Tensor) -> Tensor:
        means = x.mean((2, 3))
        return y * s.child(means if isinstance(child, nn.Linear) else means[..., None, None]).view(len(x), -1, 1, 1)

    return subclass(after(weigh), child=child)


def with_mask(norm: nn.Module) -> nn.Module:
    norm.register_buffer("mask", torch.ones(8))
    return norm


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("build", "found"), DEPARTING.values(), ids=DEPARTING)
def test_refused(build: Callable[[], nn.Module], found: str, device: str) -> None:
    model = Direct(conv=conv(), bn=build()).to(device)
    with pytest.raises(normswap.NormswapError, match=f"bn: .*{found}.*register_norm"):
        normswap.convert(model, example_input=torch.zeros(2, 3, 9, 9))


def test_a_norm_that_never_uses_its_running_statistics_can_be_taught_without_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("normswap.networks.recognition._NORMS", {})
    norm = subclass(by_the_batch)
    with torch.no_grad():
        for value in (norm.weight, norm.running_mean, norm.running_var):
            value.uniform_(0.5, 2)
    model = Direct(conv=conv(), bn=norm).eval()
    x = torch.randn(1, 3, 9, 9)
    with pytest.raises(normswap.NormswapError, match="by the batch's statistics in eval mode, too"):
        normswap.convert(model, example_input=x)
    normswap.register_norm(type(norm), lambda m: normswap.NormParts(m.num_features, m.eps, m.weight, m.bias))
    converted = normswap.convert(model, overrides={"bn": {"groups": 4}}, example_input=x)
    expected = F.relu(F.group_norm(model.conv(x), 4, norm.weight, norm.bias, norm.eps))
    torch.testing.assert_close(converted(x), expected, rtol=1e-4, atol=1e-4)


def test_refused_beside_other_norms() -> None:
    model = nn.Sequential(conv(), nn.BatchNorm2d(8), subclass(by_hand(F.softplus)))
    with pytest.raises(normswap.CheckFailed, match=r"2: in eval mode .*; or teach it with normswap.register_norm"):
        normswap.convert(model, example_input=torch.zeros(2, 3, 9, 9))
    kept = normswap.convert(model, example_input=torch.zeros(2, 3, 9, 9), exclude=["2"])
    assert [type(module).__name__ for module in kept] == ["WSConv2d", "GroupNorm", "Own"]  # type: ignore[union-attr]


class LastAxis(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize(
    ("length", "found"), [(8, OFF), (5, r"its input \(2, 5, 8\) does not have its 8 channels on axis 1")]
)
def test_channels_on_another_axis(length: int, found: str) -> None:
    model = nn.Sequential(nn.Linear(4, 8), LastAxis(8))
    with pytest.raises(normswap.NothingToConvert, match=f"1: {found}"):
        normswap.convert(model, example_input=torch.zeros(2, length, 4))


class Turning(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return self[1](self[0](x).transpose(1, 2)).transpose(1, 2)


def test_the_way_on_with_channels_on_another_axis_works() -> None:
    x = torch.randn(2, 5, 4)
    with pytest.raises(normswap.NothingToConvert, match=r": turn the axes in the forward that calls it\)$"):
        normswap.convert(nn.Sequential(nn.Linear(4, 8), LastAxis(8)), example_input=x)
    beside = nn.Sequential(nn.Linear(4, 8), LastAxis(8), nn.Flatten(1), nn.Linear(40, 4), nn.BatchNorm1d(4))
    with pytest.raises(
        normswap.CheckFailed, match=r"turn the axes in the forward .* it; or leave it alone with exclud"
    ):
        normswap.convert(beside, example_input=x)
    converted = normswap.convert(Turning(nn.Linear(4, 8), nn.BatchNorm1d(8)), example_input=x)
    assert isinstance(converted[1], nn.GroupNorm)  # type: ignore[index]


class Frozen(nn.BatchNorm2d):
    """In eval mode for ever."""

    def train(self, mode: bool = True) -> "Frozen":
        return super().train(False)


class Casting(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


def own_in_train(self: Any, x: Tensor) -> Tensor:
    if not self.training:
        return EXACTLY(self, x)
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
    return (x - mean) / (var + self.eps).sqrt() * self.weight[:, None, None] + self.bias[:, None, None]


KEPT: dict[str, Callable[[], nn.Module]] = {
    "timm's norm with an activation": lambda: BatchNormAct2d(8, act_layer=nn.SiLU, inplace=True),
    "timm's norm with dropout": lambda: BatchNormAct2d(8, drop_layer=nn.Dropout),
    "timm's frozen norm": lambda: FrozenBatchNormAct2d(8),
    "timm's synchronized norm": lambda: synchronized(BatchNormAct2d(8)),
    "torchvision's frozen norm": lambda: FrozenBatchNorm2d(8, eps=1e-3),
    "a PReLU": lambda: BatchNormAct2d(8, act_layer=nn.PReLU),
    "frozen by its train()": lambda: Frozen(8),
    "casts": lambda: Casting(8),
    "no affine part": lambda: type("Own", (nn.BatchNorm2d,), {})(8, affine=False),
    "no statistics": lambda: type("Own", (nn.BatchNorm2d,), {})(8, track_running_stats=False),
    "by hand in train mode": lambda: subclass(own_in_train),
    "bound on the instance": lambda: bound(nn.BatchNorm2d(8)),
    "duck": lambda: Duck(lambda x, w, b, m, v: x * (v + 1e-5).rsqrt() * w + (b - m * (v + 1e-5).rsqrt() * w)),
}


def synchronized(norm: nn.Module) -> nn.Module:
    model = convert_sync_batchnorm(nn.Sequential(norm))
    assert type(model[0]) is SyncBatchNormAct, convert_sync_batchnorm
    return model[0]


def bound(norm: nn.Module) -> nn.Module:
    norm.forward = EXACTLY.__get__(norm)
    return norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("build", KEPT.values(), ids=KEPT)
def test_replaced(build: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    model = Direct(conv=conv(), bn=build()).to(dtype)
    before, drawn, python = described(model), torch.get_rng_state(), random.getstate()
    plan = normswap.inspect(model, example_input=torch.zeros(2, 3, 9, 9, dtype=dtype))
    assert plan.norms[0].groups == 4, plan.norms[0].reason
    assert described(model) == before
    assert torch.equal(torch.get_rng_state(), drawn)
    assert random.getstate() == python


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_one_that_never_runs_is_shown_all_the_same(device: str) -> None:
    model = Direct(conv=conv(), bn=nn.BatchNorm2d(8), a=Casting(8), b=subclass(by_hand(F.softplus))).to(device)
    a, b = normswap.inspect(model, example_input=torch.zeros(2, 3, 9, 9)).norms[1:]
    assert (a.groups, b.groups) == (4, None)
    assert b.reason.startswith(OFF)


def test_a_function_put_on_the_instance_is_not_run() -> None:
    norm = nn.BatchNorm2d(8)
    ran = norm.forward
    norm.forward = lambda x: 2 * ran(x)
    before = copy.deepcopy(norm.state_dict())
    with pytest.raises(normswap.NothingToConvert, match="bn: its forward was replaced by a function that no copy"):
        normswap.convert(Direct(conv=conv(), bn=norm), example_input=torch.zeros(2, 3, 9, 9))
    assert all(torch.equal(value, before[key]) for key, value in norm.state_dict().items())


def test_an_attribute_that_differs_is_seen() -> None:
    forward = after(lambda s, y, x: y * s.factor)
    kind = type("Own", (nn.BatchNorm2d,), {"forward": forward, "factor": 1})
    norms = [kind(8) for _ in range(4)]
    norms[2].factor = 2  # type: ignore[attr-defined]
    plan = normswap.inspect(nn.Sequential(conv(), *norms), example_input=torch.zeros(2, 3, 9, 9))
    assert [entry.groups for entry in plan.norms] == [4, 4, None, 4]


@pytest.mark.parametrize(("factor", "groups"), [(1, 4), (2, None)])
def test_a_taught_class_is_believed_in_train_mode_alone(
    factor: int, groups: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from normswap.networks import recognition

    monkeypatch.setattr(recognition, "_NORMS", {})
    norm = subclass(after(lambda s, y, x: y * (3 if s.training else factor)))
    normswap.register_norm(
        type(norm),
        lambda m: normswap.NormParts(8, m.eps, m.weight, m.bias, m.running_mean, m.running_var),  # type: ignore[arg-type]
    )
    plan = normswap.inspect(Direct(conv=conv(), bn=norm), example_input=torch.zeros(2, 3, 9, 9))
    assert plan.norms[0].groups == groups


@pytest.mark.parametrize("channels", [64, 528, 2352, 7392])
def test_of_many_channels_none_is_lost_to_rounding(channels: int) -> None:
    assert departure(BatchNormAct2d(channels), ("act",), (2, channels, 7, 7)) == ""
