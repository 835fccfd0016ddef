"""What save writes load reads, after whatever a user did to the network; the rest is refused with the layer's name."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from badnets import small, trained
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import normswap
from normswap.layers.norms import ChannelScale, GroupNormAct
from normswap.planning.schema import DTYPES

X = torch.randn(2, 3, 16, 16)


def build() -> nn.Sequential:
    model: nn.Sequential = trained(
        nn.Sequential(nn.Conv2d(3, 16, 3), BatchNormAct2d(16), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16))
    )
    return model


def named(name: str) -> nn.Module:
    model = nn.Sequential()
    model.add_module(name, nn.Conv2d(3, 16, 3))
    model.add_module("bn", nn.BatchNorm2d(16))
    return model.eval()


@pytest.mark.parametrize("name", ["a b", "nb\xa0sp", "z\u200bw", "\u202eright", "层", "a" * 9000, "'\"\\"], ids=ascii)
def test_names_of_one_line(name: str, tmp_path: Path) -> None:
    model = normswap.convert(named(name), example_input=X)
    loaded = normswap.load(normswap.save(model, tmp_path), model=named(name))
    assert torch.equal(loaded(X), model(X))
    assert normswap.plan_of(loaded) == normswap.plan_of(model)


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31m", "a\x85b", "a\u2028b", "a" * 10_001], ids=ascii)
def test_names_that_could_not_be_read_are_refused(name: str, tmp_path: Path) -> None:
    model = normswap.convert(named(name), example_input=X)
    with pytest.raises(normswap.CheckpointError, match="a layer's name must be one line") as caught:
        normswap.save(model, tmp_path / "OUT")
    assert str(caught.value).isprintable()
    assert not (tmp_path / "OUT").exists()


class Cast(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


@pytest.mark.filterwarnings("ignore:ComplexHalf", "ignore:Casting complex")
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_inputs_of_every_type(dtype: str, tmp_path: Path) -> None:
    example = torch.empty(2, 3, 8, 8, device="meta", dtype=getattr(torch, dtype))
    model = normswap.convert(Cast(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)), example_input=example)
    loaded = normswap.load(normswap.save(model, tmp_path), model=Cast(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)))
    assert normswap.plan_of(loaded) == normswap.plan_of(model)


def test_inputs_that_are_too_large_are_left_out(tmp_path: Path) -> None:
    model = normswap.convert(small(), example_input=torch.empty(2, 3, 8192, 8192, device="meta"))
    loaded = normswap.load(normswap.save(model, tmp_path), model=small())
    assert normswap.plan_of(loaded).inputs is None
    assert normswap.plan_of(loaded).entries == normswap.plan_of(model).entries


def fewer_groups(model: Any) -> None:
    model[1].num_groups = 2


def another_epsilon(model: Any) -> None:
    model[3].eps = 0.5


def another_norm(model: Any) -> None:
    model[3] = nn.GroupNorm(4, 16, eps=1e-3)


def another_norm_with_its_activation(model: Any) -> None:
    model[1] = GroupNormAct(4, 16, then={"drop": model[1].drop, "act": model[1].act})


def a_scale(model: Any) -> None:
    model[3] = ChannelScale(16)


def batch_norm_again(model: Any) -> None:
    model[3] = nn.BatchNorm2d(16)
    nn.init.normal_(model[3].running_mean)
    model.eval()


def a_plain_convolution(model: Any) -> None:
    model[2] = nn.Conv2d(16, 16, 3)


def folded(model: Any) -> None:
    normswap.fold(model, inplace=True)


def standardization_epsilon(model: Any) -> None:
    model[2].ws_eps = 0.1


CHANGES = [fewer_groups, another_epsilon, another_norm, another_norm_with_its_activation, a_scale, batch_norm_again,
           a_plain_convolution, folded, standardization_epsilon]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_layers_are_written_as_they_are(change: Callable[[nn.Module], None], tmp_path: Path) -> None:
    model = normswap.convert(build(), example_input=X)
    before = model(X)
    change(model)
    assert change is folded or not torch.allclose(model(X), before)
    loaded = normswap.load(normswap.save(model, tmp_path), model=build())
    torch.testing.assert_close(loaded(X), model(X))
    assert [type(module) for module in loaded.modules()] == [type(module) for module in model.modules()]


def test_a_frozen_norms_epsilon_is_written_as_it_is(tmp_path: Path) -> None:
    model = normswap.convert(build(), example_input=X, exclude="3")
    model[3].eps = 0.5  # type: ignore[index, union-attr, assignment]
    loaded = normswap.load(normswap.save(model, tmp_path), model=build())
    torch.testing.assert_close(loaded(X), model(X))


def no_norm(model: Any) -> None:
    model[3] = nn.Sequential()


def layer_norm(model: Any) -> None:
    model[3] = nn.LayerNorm([12, 12])


def no_activation(model: Any) -> None:
    model[1] = nn.GroupNorm(4, 16)


def no_affine(model: Any) -> None:
    model[3] = nn.GroupNorm(4, 16, affine=False)


def no_bias(model: Any) -> None:
    model[3].bias = None


def cut_off(model: Any) -> None:
    del model[3]


def other_channels(model: Any) -> None:
    model[2] = nn.Conv2d(16, 32, 3)
    model[3] = nn.GroupNorm(4, 32)


def no_convolution(model: Any) -> None:
    model[2] = nn.Identity()


def another_name(model: Any) -> None:
    model.add_module("again", model[3])


REFUSED = {
    no_norm: "3: has become a Sequential that a checkpoint cannot describe",
    layer_norm: "3: has become a LayerNorm that",
    no_activation: "1: has become a GroupNorm that",
    no_bias: "3: has become a GroupNorm that",
    no_affine: "3: has become a GroupNorm that",
    cut_off: "3: was converted and is no part of the network any more",
    other_channels: "2: has become a Conv2d that",
    no_convolution: "2: has become a Identity that",
    another_name: "3: is held under other names than when it was converted",
}


@pytest.mark.parametrize(("change", "says"), REFUSED.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_what_no_plan_describes_is_refused(change: Callable[[nn.Module], None], says: str, tmp_path: Path) -> None:
    model = normswap.convert(build(), example_input=X)
    change(model)
    with pytest.raises(normswap.CheckpointError, match=f"^{re.escape(says)}.*; put it back, or keep") as caught:
        normswap.save(model, tmp_path / "OUT")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "OUT").exists()


def activation(model: Any) -> str:
    model.layer1[0].act1 = nn.SiLU()
    return "layer1.0.act1: ReLU there, SiLU here"


def dilation(model: Any) -> str:
    conv = model.layer1[0].conv1
    conv.dilation = conv.padding = (2, 2)
    return r"layer1.0.conv1: \w*Conv2d\(.*padding=\(1, 1\).* there, \w*Conv2d\(.*dilation=\(2, 2\).* here"


def head(model: Any) -> str:
    model.fc = nn.Sequential(nn.Dropout(0.1), nn.Linear(model.num_features, 3))
    return r"fc.1.bias: missing there, \(3,\) here"


def pooling(model: Any) -> str:
    model.reset_classifier(3, "max")
    return "global_pool.pool: AdaptiveAvgPool2d there, AdaptiveMaxPool2d here"


CHANGED = pytest.mark.parametrize("change", [activation, dilation, head, pooling])


@CHANGED
def test_a_source_that_builds_another_network_is_refused(change: Callable[[nn.Module], str], tmp_path: Path) -> None:
    model = normswap.convert(timm.create_model("test_resnet"))
    says = change(model)
    with pytest.raises(normswap.CheckpointError, match=f"builds another network .(fc.bias|{says})") as caught:
        normswap.save(model, tmp_path / "OUT", source="timm/test_resnet")
    assert str(caught.value).endswith("or leave the source out")
    assert not (tmp_path / "OUT").exists()


@CHANGED
def test_a_network_that_its_remembered_source_does_not_build(
    change: Callable[[nn.Module], str], tmp_path: Path
) -> None:
    """`save` refused it and advised another source, or none, which nobody had given."""
    original = timm.create_model("test_resnet")
    says = change(original)
    model = normswap.convert(original.eval())
    with pytest.warns(UserWarning, match=f"{says}. and is left out; load"):
        normswap.save(model, tmp_path)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(normswap.load(tmp_path, model=original)(x), model(x))
    with pytest.raises(normswap.CheckpointError, match="names no registered model; pass load.directory, model="):
        normswap.load(tmp_path)


@pytest.mark.parametrize("inplace", [True, False], ids=["in place", "copy"])
def test_a_network_that_was_converted_twice(inplace: bool, tmp_path: Path) -> None:
    def longer() -> nn.Sequential:
        return nn.Sequential(*build(), nn.Conv2d(16, 8, 3), nn.BatchNorm2d(8)).eval()

    once: Any = normswap.convert(build(), example_input=X)
    once.extend([nn.Conv2d(16, 8, 3), nn.BatchNorm2d(8).eval()])
    twice = normswap.convert(once, example_input=X, inplace=inplace, groups=4)
    names = [entry.name for entry in normswap.plan_of(twice).changes]
    assert names == ["0", "1", "2", "3", "4", "5"]
    loaded = normswap.load(normswap.save(twice, tmp_path), model=longer())
    torch.testing.assert_close(loaded(X), twice(X))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.uint16, torch.float8_e5m2, torch.bool], ids=str)
def test_tensors_of_every_type_that_files_hold(dtype: torch.dtype, tmp_path: Path) -> None:
    def holding() -> nn.Module:
        model = small()
        model.register_buffer("more", torch.ones(3).to(dtype))
        return model

    loaded = normswap.load(normswap.save(normswap.convert(holding(), example_input=X), tmp_path), model=holding())
    assert loaded.more.dtype == dtype  # type: ignore[union-attr]
    assert [complex(value) for value in loaded.more.tolist()] == [1, 1, 1]  # type: ignore[operator, union-attr]


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (torch.ones(3, dtype=torch.complex128), "more: is strided complex128, which safetensors cannot hold"),
        (torch.eye(3).to_sparse(), "more: is sparse_coo float32, which safetensors cannot hold"),
        (
            TwoTensor(torch.ones(3), torch.ones(3)),
            "more: is a TwoTensor, whose values are in other tensors .* fill a network that is not with its full state",
        ),
    ],
    ids=["complex", "sparse", "sharded or quantized"],
)
def test_tensors_that_no_file_holds_are_refused(tensor: Tensor, says: str, tmp_path: Path) -> None:
    model = normswap.convert(small(), example_input=X)
    model.register_buffer("more", tensor)
    with pytest.raises(normswap.CheckpointError, match=says):
        normswap.save(model, tmp_path / "OUT")


def test_numbers_that_json_has_not_are_left_out(tmp_path: Path) -> None:
    model = normswap.convert(timm.create_model("test_resnet"))
    model.pretrained_cfg = {**model.pretrained_cfg, "crop_pct": float("nan"), "test": {1: 2}}  # type: ignore[dict-item]
    loaded = normswap.load(normswap.save(model, tmp_path))
    assert "test" not in loaded.pretrained_cfg  # type: ignore[operator]


def test_a_plan_that_would_be_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normswap.checkpoint.saving.MAX_BYTES", 1 << 10)
    with pytest.raises(
        normswap.CheckpointError, match=r"config.json: cannot be written \(would be larger than 0 MiB\)"
    ):
        normswap.save(normswap.convert(small(), example_input=X), tmp_path / "OUT")


class Tall(nn.Module):
    """A body and a head; the body's second kernel has as many rows as the head."""

    def __init__(self, classes: int = 4, inputs: int = 3) -> None:
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(inputs, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bn(self.conv(x)).mean((2, 3)))


def test_another_head_is_left_at_random_and_nothing_else(tmp_path: Path) -> None:
    model = normswap.convert(timm.create_model("test_resnet"))
    folder = normswap.save(model, tmp_path / "timm")
    loaded = normswap.load(folder, num_classes=5)
    other = {key for key, value in loaded.state_dict().items() if value.shape != model.state_dict()[key].shape}
    assert other == {"fc.weight", "fc.bias"}
    own = normswap.convert(Tall(), example_input=X)
    folder = normswap.save(own, tmp_path / "own")
    tuned = normswap.load(folder, model=Tall(7), num_classes=7)
    assert torch.equal(tuned.conv.weight, own.conv.weight)  # type: ignore[union-attr]


def test_classes_that_a_given_network_does_not_have_are_refused(tmp_path: Path) -> None:
    """It fitted with the head that it had, and nobody was told."""
    own = normswap.convert(Tall(), example_input=X)
    folder = normswap.save(own, tmp_path)
    with pytest.raises(normswap.InvalidOption, match=r"num_classes=5 says nothing: .* build it with as many classes"):
        normswap.load(folder, model=Tall(), num_classes=5)
    with pytest.raises(normswap.CheckpointError, match=r"head.weight is \(4, 8\), the network has \(7, 8\)"):
        normswap.load(folder, model=Tall(7), num_classes=5)
    assert torch.equal(normswap.load(folder, model=Tall(), num_classes=4).head.weight, own.head.weight)  # type: ignore[union-attr]


@pytest.mark.parametrize("classes", [5, 1000], ids=["another head", "the same head"])
def test_a_body_that_does_not_fit_is_refused_whatever_the_head(classes: int, tmp_path: Path) -> None:
    folder = normswap.save(normswap.convert(timm.create_model("test_resnet")), tmp_path / "OUT")
    grey = normswap.apply(timm.create_model("test_resnet", in_chans=1, num_classes=5), folder / "config.json")
    torch.save(grey.state_dict(), tmp_path / "w.pth")
    with pytest.raises(
        normswap.CheckpointError, match=r"conv1.0.weight is \(16, 1, 3, 3\), the network has \(16, 3, 3, 3\)"
    ):
        normswap.load(folder, num_classes=classes, weights=tmp_path / "w.pth")
    own = normswap.save(normswap.convert(Tall(), example_input=X), tmp_path / "own")
    with pytest.raises(
        normswap.CheckpointError, match=r"conv.weight is \(8, 3, 3, 3\), the network has \(8, 1, 3, 3\)"
    ):
        normswap.load(own, model=Tall(7, 1), num_classes=7)
