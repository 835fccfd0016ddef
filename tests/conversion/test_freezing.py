"""``to="frozen"``: every BatchNorm keeps its function and its statistics, convolutions stay as they are."""

import copy
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from badnets import small, trained
from nets import CHANNELS, Direct, DuckFrozen, conv
from refusals import SHAPE, run
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops.misc import FrozenBatchNorm2d

import normswap
from normswap.errors import CheckFailed, InvalidOption, NothingToConvert
from normswap.layers.convs import WeightStandardized
from normswap.layers.norms import FrozenBatchNorm

X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
BUILDS = {
    "plain": lambda: small(),
    "timm resnet18": lambda: trained(timm.create_model("resnet18", num_classes=5)),
    "timm with activations": lambda: trained(timm.create_model("test_efficientnet", num_classes=5)),
    "torchvision mobilenet": lambda: trained(torchvision.models.mobilenet_v3_small(num_classes=5)),
}
ALL = pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)


@ALL
@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "in place"])
def test_the_function_is_that_of_eval_mode_to_the_bit_in_both_modes(build: object, inplace: bool) -> None:
    model = build().eval()  # type: ignore[operator]
    with torch.no_grad():
        expected = model(X)
    convs = {name: p.detach().clone() for name, p in model.named_parameters()}
    frozen = normswap.convert(model, to="frozen", example_input=X[:2], inplace=inplace)
    assert not any(isinstance(module, (_BatchNorm, nn.GroupNorm, WeightStandardized)) for module in frozen.modules())
    with torch.no_grad():
        assert torch.equal(frozen.eval()(X), expected)
    for module in frozen.train().modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    before = {name: value.clone() for name, value in frozen.state_dict().items()}
    with torch.no_grad():
        assert torch.equal(frozen(X), expected)
    assert all(torch.equal(value, before[name]) for name, value in frozen.state_dict().items())
    assert all(torch.equal(p, convs[name]) for name, p in frozen.named_parameters())


def test_everything_trains_but_the_statistics() -> None:
    frozen = normswap.convert(small(), to="frozen", example_input=X[:2]).train()
    frozen(X).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in frozen.parameters())
    assert {type(module) for module in frozen.modules()} >= {FrozenBatchNorm, nn.Conv2d}


def test_the_plan_gives_reasons() -> None:
    plan = normswap.inspect(small(), to="frozen", example_input=X[:2])
    assert [(e.action, e.reason) for e in plan.norms] == [
        ("freeze", "keeps its statistics and its function, as to='frozen' asks")
    ] * len(plan.norms)
    assert not any(entry.changes for entry in plan.convs)
    assert {e.reason.replace(e.feeds[0], "N") for e in plan.convs} == {
        "its output is read by N, which is left as it is"
    }
    text = str(plan)
    assert f"{len(plan.norms)} of {len(plan.norms)} norms become FrozenBatchNorm" in text
    assert "GroupNorm" not in text
    assert plan == normswap.Plan.from_dict(plan.to_dict())
    again = normswap.apply(small(), plan)
    assert sum(isinstance(module, FrozenBatchNorm) for module in again.modules()) == len(plan.norms)


@ALL
def test_checkpoints_hold_it_and_checks_pass(build: object, tmp_path: Path) -> None:
    model = build()  # type: ignore[operator]
    frozen = normswap.convert(copy.deepcopy(model), to="frozen", example_input=X[:2])
    checks = normswap.check(frozen, model)
    assert checks, checks
    details = {row.name: row.detail for row in checks.rows}
    count = sum(isinstance(module, _BatchNorm) for module in model.modules())
    assert details["no BatchNorm left"] == f"0 of {count} replaced, {count} frozen"
    loaded = normswap.load(normswap.save(frozen, tmp_path / "OUT"), model=model)
    with torch.no_grad():
        assert torch.equal(loaded.train(False)(X), frozen.eval()(X))
    card = (tmp_path / "OUT" / "README.md").read_text()
    assert "with frozen BatchNorm" in card
    assert f"fixed statistics in every BatchNorm ({count} layers)" in card
    assert "group-norm" not in card


def test_the_command_line_does_it(tmp_path: Path) -> None:
    target = tmp_path / "OUT"
    code, _, stderr = run("convert", "badnets:small", "--input", SHAPE, "--to", "frozen", "-o", target)
    assert code == 0, stderr
    loaded = normswap.load(target, model=small())
    assert sum(isinstance(module, FrozenBatchNorm) for module in loaded.modules()) == 2
    code, stdout, stderr = run("check", target, "--against", "badnets:small")
    assert code == 0, stdout + stderr
    code, stdout, _ = run("inspect", "badnets:small", "--input", SHAPE, "--to", "frozen")
    assert code == 0
    assert "2 of 2 norms become FrozenBatchNorm" in stdout


def test_some_layers_may_be_frozen_and_others_replaced() -> None:
    mixed = normswap.convert(small(), overrides={"4": {"to": "frozen"}}, example_input=X[:2])
    assert [type(mixed[i]).__name__ for i in (1, 4)] == ["GroupNorm", "FrozenBatchNorm"]  # type: ignore[index]
    other = normswap.convert(small(), to="frozen", overrides={"4": {"to": "layer"}}, example_input=X[:2])
    assert [type(other[i]).__name__ for i in (1, 4)] == ["FrozenBatchNorm", "GroupNorm"]  # type: ignore[index]
    alone = normswap.convert(small(), overrides={"*": {"to": "frozen"}}, example_input=X[:2])
    assert [type(alone[i]).__name__ for i in (1, 4)] == ["FrozenBatchNorm"] * 2  # type: ignore[index]


def test_a_frozen_network_can_be_converted_later() -> None:
    model = small()
    later = normswap.convert(normswap.convert(model, to="frozen", example_input=X[:2]), example_input=X[:2])
    assert torch.equal(later(X), normswap.convert(model, example_input=X[:2])(X))


class Doubled(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("norm", [FrozenBatchNorm2d(CHANNELS), DuckFrozen(CHANNELS)], ids=["torchvision", "duck"])
def test_norms_that_are_frozen_already_stay(norm: nn.Module) -> None:
    model = nn.Sequential(conv(), norm, conv(CHANNELS), nn.BatchNorm2d(CHANNELS))
    frozen = normswap.convert(model, to="frozen", example_input=X[:2])
    assert [type(layer) for layer in frozen] == [nn.Conv2d, type(norm), nn.Conv2d, FrozenBatchNorm]
    (entry, _) = normswap.plan_of(frozen).norms
    assert entry.reason == "its statistics are fixed already"
    with pytest.raises(NothingToConvert, match="its statistics are fixed already"):
        normswap.convert(Direct(conv=conv(), bn=norm), to="frozen", example_input=X[:2])


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (nn.BatchNorm2d(CHANNELS, track_running_stats=False), "cannot be frozen: it keeps no statistics"),
        (Doubled(CHANNELS), "its forward also computes mul"),
    ],
    ids=["no statistics", "another function"],
)
def test_what_cannot_be_frozen_is_refused_with_the_layer_and_the_reason(norm: nn.Module, reason: str) -> None:
    model = nn.Sequential(conv(), norm, conv(CHANNELS), nn.BatchNorm2d(CHANNELS))
    with pytest.raises(CheckFailed, match=rf"no BatchNorm left: 1 left: 1; 1: {reason}.*exclude="):
        normswap.convert(model, to="frozen", example_input=X[:2])


class Edged(nn.Module):
    """Pads with what its norm makes of zero, as branches do that are merged into one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.last = conv(), nn.BatchNorm2d(CHANNELS), conv(CHANNELS)
        self.end = nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        y, bn = self.bn(self.conv(x)), self.bn
        edge = bn.bias - bn.running_mean * bn.weight / (bn.running_var + bn.eps).sqrt()
        row = edge.view(1, -1, 1, 1).expand(len(y), -1, 1, y.shape[-1])
        return self.end(self.last(torch.cat([row, y, row], 2)))


@pytest.mark.parametrize("options", [{"to": "frozen"}, {"exclude": ["bn"]}], ids=str)
def test_a_norm_with_which_others_compute_is_frozen(options: dict[str, object]) -> None:
    model = trained(Edged()).eval()
    frozen = normswap.convert(model, example_input=X[:2], **options).train()
    assert isinstance(frozen.bn, FrozenBatchNorm)
    statistics = frozen.bn.running_mean.clone()
    seen = dict[str, Tensor]()
    frozen.last.register_forward_pre_hook(lambda _, args: seen.update(padded=args[0]))
    frozen(X).square().sum().backward()
    model.last.register_forward_pre_hook(lambda _, args: seen.update(expected=args[0]))
    model(X)
    torch.testing.assert_close(seen["padded"], seen["expected"])
    assert torch.equal(frozen.bn.running_mean, statistics)
    assert frozen.bn.weight.grad is not None


@pytest.mark.parametrize("ws", ["adaptive", "standard"])
def test_weight_standardization_is_refused_at_the_start(ws: str) -> None:
    with pytest.raises(InvalidOption, match=r"to='frozen' leaves convolutions as they are: leave ws= out"):
        normswap.inspect(nn.Identity(), to="frozen", ws=ws)
    code, _, stderr = run("convert", "badnets:small", "--to", "frozen", "--ws", ws)
    assert code == 2
    assert "leave ws= out" in stderr


def test_fresh_norms_are_warned_of() -> None:
    model = nn.Sequential(conv(), nn.BatchNorm2d(CHANNELS))
    plan = normswap.inspect(model, to="frozen", example_input=X[:2])
    assert plan.warnings == (
        "1 norms are frozen before they were trained (1, …): they normalize nothing; train them first",
    )
