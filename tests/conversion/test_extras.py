"""What a norm carries besides its own tensors is on what replaces it; what a network asks of its norms is named."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from nets import Direct, Net, conv, warm
from torch import Tensor, nn

import normswap

X = torch.zeros(2, 3, 8, 8)


def laden() -> Direct:
    model = Direct(conv=conv(), bn=nn.BatchNorm2d(8)).eval()
    norm = model.bn
    norm.register_buffer("mask", torch.arange(8.0))
    norm.register_buffer("hidden", torch.ones(1), persistent=False)
    norm.register_parameter("extra", nn.Parameter(torch.full((3,), 2.0)))
    norm.gauge = nn.Linear(2, 2)
    norm.lr_scale, norm.tags = 0.1, {"stage": 1}  # type: ignore[assignment]
    norm._register_state_dict_hook(lambda m, state, prefix, _: state.update({f"{prefix}version": torch.ones(1)}))
    return model  # type: ignore[return-value]


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "in place"])
def test_extras_are_carried(inplace: bool) -> None:
    model = laden()
    mask, norm = model.bn.mask, model.bn
    result = normswap.convert(model, example_input=X, inplace=inplace)
    new: Any = result.bn
    assert isinstance(new, nn.GroupNorm)
    assert (new.lr_scale, new.tags, new.mask.tolist(), new.extra.tolist()) == (
        0.1,
        {"stage": 1},
        mask.tolist(),
        [2] * 3,
    )
    assert (new.mask is mask, new.extra is norm.extra) == (inplace, inplace)
    assert set(result.state_dict()) >= {"bn.mask", "bn.extra", "bn.version", "bn.gauge.weight"}
    assert torch.equal(new.gauge.weight, norm.gauge.weight)  # type: ignore[union-attr, arg-type]
    assert "bn.hidden" not in result.state_dict()
    assert not {"bn.running_mean", "bn.num_batches_tracked"} & set(result.state_dict())
    assert not hasattr(new, "momentum")


def test_extras_are_saved_and_loaded(tmp_path: Path) -> None:
    model = laden()
    model.bn._state_dict_hooks.clear()
    again = laden()
    again.bn._state_dict_hooks.clear()
    nn.init.zeros_(again.bn.mask)  # type: ignore[arg-type]
    loaded: Any = normswap.load(normswap.save(normswap.convert(model, example_input=X), tmp_path / "OUT"), model=again)
    assert torch.equal(loaded.bn.mask, model.bn.mask)  # type: ignore[arg-type]


class Remembers(nn.Identity):
    """Holds a state that is no tensor."""

    def get_extra_state(self) -> dict[str, int]:
        return {"seen": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        assert state == {"seen": 3}


def test_a_state_that_is_no_tensor_is_left_alone_and_named_by_save(tmp_path: Path) -> None:
    """Looking for tensors in the state dict of a trained network raised an AttributeError."""
    model = nn.Sequential(conv(), warm(nn.BatchNorm2d(8)), Remembers()).eval()
    converted = normswap.convert(model, example_input=X)
    assert converted.state_dict()["2._extra_state"] == {"seen": 3}
    assert normswap.plan_of(converted).scales
    normswap.calibrate(converted, model, [torch.randn(8, 3, 8, 8) for _ in range(4)], steps=1)
    with pytest.raises(normswap.CheckpointError, match="^2._extra_state: is a dict, not a tensor; it cannot be saved"):
        normswap.save(converted, tmp_path / "OUT")


def test_hooks_on_loading_see_the_replacement() -> None:
    model, seen = laden(), list[nn.Module]()
    model.bn.register_load_state_dict_pre_hook(lambda module, *_: seen.append(module))
    model.bn.register_load_state_dict_post_hook(lambda module, _: seen.append(module))
    result = normswap.convert(model, example_input=X)
    seen.clear()
    result.load_state_dict(result.state_dict(), strict=False)
    assert [module is result.bn for module in seen] == [True, True]
    seen.clear()
    model.load_state_dict(model.state_dict(), strict=False)
    assert [module is model.bn for module in seen] == [True, True]


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "in place"])
def test_a_hook_that_needs_batch_norm_is_named(inplace: bool) -> None:
    model = laden()
    model.bn._register_state_dict_hook(lambda m, state, prefix, _: state.pop(f"{prefix}running_mean"))
    before = copy.deepcopy(model)
    with pytest.raises(normswap.UnsupportedModel, match="^bn: its state-dict hook does not run once converted .*; rem"):
        normswap.convert(model, example_input=X, inplace=inplace)
    assert repr(model) == repr(before)


class Outside(nn.Module):
    """Computes what a norm computes, from outside of it."""

    def __init__(self, bn: nn.BatchNorm2d) -> None:
        super().__init__()
        self.bn = bn

    def forward(self, x: Tensor) -> Tensor:
        own = self.bn
        return F.batch_norm(x, own.running_mean, own.running_var, own.weight, own.bias, own.training, eps=own.eps)


ASKS: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "statistics": (lambda s, x: s.bn(s.conv(x)) * s.bn.running_var.mean(), "running_var"),
    "statistics before it runs": (lambda s, x: s.bn(s.conv(x) * s.bn.running_var.mean()), "running_var"),
    "statistics, or else": (
        lambda s, x: s.bn(s.conv(x)) * getattr(s.bn, "running_mean", torch.zeros(1)).mean(),
        "running_mean",
    ),
    "whether there are any": (
        lambda s, x: s.bn(s.conv(x)) + hasattr(s.bn, "num_batches_tracked"), "num_batches_tracked"
    ),
    "epsilon": (lambda s, x: s.bn(s.conv(x)) + s.bn.eps, "eps"),
    "momentum": (lambda s, x: s.bn(s.conv(x)) + getattr(s.bn, "momentum", 0), "momentum"),
    "all at once": (lambda s, x: Outside(s.bn)(s.conv(x)), "eps"),
}  # fmt: skip


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "in place"])
@pytest.mark.parametrize(("forward", "what"), ASKS.values(), ids=ASKS)
def test_a_network_that_asks_what_only_batch_norm_has(
    forward: Callable[[Any, Tensor], Tensor], what: str, inplace: bool
) -> None:
    net = type("Asks", (Net,), {"forward": lambda s, x: s.last(forward(s, x))})
    model = net(conv=conv(), bn=nn.BatchNorm2d(8), last=nn.BatchNorm2d(8))
    with pytest.raises(
        normswap.CheckFailed,
        match=f"1 left: bn; bn: code outside of it asks for its {what}, .*leave it alone with exclude=",
    ):
        normswap.convert(model, example_input=X, inplace=inplace)
    assert type(model.bn) is nn.BatchNorm2d
    converted = normswap.convert(model, example_input=X, exclude=["bn"], keep="live", inplace=inplace).eval()
    assert type(converted.bn) is nn.BatchNorm2d
    assert type(converted.last) is nn.GroupNorm


CLASSES: dict[str, Callable[[nn.Module], bool]] = {
    "instance": lambda bn: isinstance(bn, nn.BatchNorm2d),
    "very class": lambda bn: type(bn) is nn.BatchNorm2d,
    "one of several": lambda bn: bn.__class__ in (nn.BatchNorm1d, nn.BatchNorm2d),
    "key": lambda bn: type(bn) in {nn.BatchNorm2d: None},
}


@pytest.mark.parametrize("knows", CLASSES.values(), ids=CLASSES)
def test_a_network_that_goes_another_way_by_class(knows: Callable[[nn.Module], bool]) -> None:
    forward = lambda s, x: s.bn(s.conv(x)) if knows(s.bn) else s.conv(x)  # noqa: E731
    model = type("Asks", (Net,), {"forward": forward})(conv=conv(), bn=nn.BatchNorm2d(8))
    says = (
        r"bn ran before and does not any more \(the forward pass goes another way.*leave that layer alone with exclude="
    )
    with pytest.raises(normswap.CheckFailed, match=says):
        normswap.convert(model, example_input=X)


EMPTY: dict[str, Callable[[Any], object]] = {
    "affine": lambda bn: bn.affine,
    "weight": lambda bn: bn.weight is None,
    "bias": lambda bn: bn.bias is not None,
}


@pytest.mark.parametrize("ask", EMPTY.values(), ids=EMPTY)
@pytest.mark.parametrize("affine", [True, False])
def test_an_affine_part_that_is_not_there_is_there_afterwards(ask: Callable[[Any], object], affine: bool) -> None:
    forward = lambda s, x: s.bn(s.conv(x)) + float(bool(ask(s.bn)))  # noqa: E731
    model = type("Asks", (Net,), {"forward": forward})(conv=conv(), bn=nn.BatchNorm2d(8, affine=affine))
    entry = normswap.inspect(model, example_input=X).norms[0]
    assert entry.changes == affine
    assert affine or entry.reason.startswith("code outside of it asks for its ")


class Own(nn.BatchNorm2d):
    """Its own code reads all of it, on whatever way."""

    @property
    def spread(self) -> Tensor:
        return (self.running_var + self.eps).rsqrt()  # type: ignore[operator]

    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            return super().forward(input)
        factor = self.spread * self.weight
        shift = self.bias - factor * self.running_mean
        return torch.stack([one * factor.view(-1, 1, 1) + shift.view(-1, 1, 1) for one in input])


@pytest.mark.parametrize("called", [lambda bn, x: bn(x), lambda bn, x: bn.forward(x)], ids=["called", "past its hooks"])
def test_a_norm_s_own_code_may_ask(called: Callable[[Any, Tensor], Tensor]) -> None:
    for kind in (nn.BatchNorm2d, Own):
        model = type("Asks", (Net,), {"forward": lambda s, x: called(s.bn, s.conv(x))})(conv=conv(), bn=kind(8))
        if kind is nn.BatchNorm2d or "hooks" not in str(called):
            assert normswap.inspect(model, example_input=X).norms[0].changes
        assert type(model.bn) is kind


class Registered(nn.BatchNorm2d):
    known: ClassVar[list[str]] = []

    def __init_subclass__(cls) -> None:
        cls.known.append(cls.__name__)


def test_a_class_that_counts_its_subclasses_gets_none() -> None:
    model = Direct(conv=conv(), bn=Registered(8))
    assert normswap.inspect(model, example_input=X).norms[0].changes
    assert Registered.known == []


def test_a_network_that_asks_for_the_size_runs() -> None:
    class Asks(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x)) / self.bn.num_features

    assert normswap.check(normswap.convert(Asks(conv=conv(), bn=nn.BatchNorm2d(8)), example_input=X))


class Final(nn.Conv2d):
    def __init_subclass__(cls, **_: object) -> None:
        raise TypeError("this class is final")


class ByName(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(input=self.conv(x))


def test_a_class_that_cannot_be_subclassed_stays_plain() -> None:
    plan = normswap.plan_of(normswap.convert(nn.Sequential(Final(3, 8, 3), nn.BatchNorm2d(8)), example_input=X))
    assert plan.convs[0].reason == "its class cannot be subclassed (TypeError: this class is final)"


@pytest.mark.filterwarnings("ignore:calibration did not help")
def test_a_norm_called_by_keyword_is_watched() -> None:
    model = ByName(conv=conv(), bn=nn.BatchNorm2d(8))
    nn.init.normal_(model.bn.running_mean)  # type: ignore[arg-type]
    x = torch.randn(4, 3, 8, 8)
    result = normswap.convert(model, example_input=x, groups="auto", batches=[x])
    normswap.calibrate(result, model, [x] * 4)


def test_a_norm_without_channels_is_named() -> None:
    with pytest.raises(normswap.NothingToConvert, match="0: it has no channels"):
        normswap.convert(nn.Sequential(nn.BatchNorm2d(0)), example_input=torch.zeros(2, 0, 4, 4))


@pytest.mark.parametrize("samples", [2**20, 2**29], ids=["long", "beyond what a plan records"])
def test_a_long_signal(samples: int) -> None:
    model = nn.Sequential(nn.Conv1d(1, 16, 5), nn.BatchNorm1d(16))
    result = normswap.convert(model, example_input=torch.empty(1, 1, samples, device="meta"))
    assert (normswap.plan_of(result).inputs is None) == (samples == 2**29)


def test_a_name_that_no_file_can_hold(tmp_path: Path) -> None:
    model = nn.Sequential()
    model.add_module("\ud800", conv())
    model.add_module("bn", nn.BatchNorm2d(8))
    with pytest.raises(normswap.CheckpointError, match=r"'\\ud800': a layer's name must be one line.*; rename"):
        normswap.save(normswap.convert(model, example_input=X), tmp_path / "OUT")
    assert not (tmp_path / "OUT").exists()


class Silent(Direct):
    """A framework's way of overriding train()."""

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)


@pytest.mark.filterwarnings("ignore:calibration did not help")
def test_a_train_that_returns_nothing(tmp_path: Path) -> None:
    model, x = Silent(conv=conv(), bn=nn.BatchNorm2d(8)), torch.randn(2, 3, 8, 8)
    nn.init.normal_(model.bn.running_mean)  # type: ignore[arg-type]
    result = normswap.convert(model, example_input=x, batches=[x])
    assert normswap.check(result, model)
    loaded = normswap.load(normswap.save(result, tmp_path / "OUT"), model=Silent(conv=conv(), bn=nn.BatchNorm2d(8)))
    assert not loaded.training
    assert torch.equal(loaded.conv.weight, result.conv.weight)
    normswap.calibrate(result, model, [x] * 6)
    exported = normswap.export(result, tmp_path / "net.pt2")
    assert (tmp_path / "net.pt2").exists(), exported
