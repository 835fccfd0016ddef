"""Networks that frameworks build with GroupNorm compute what a converted one does, once filled."""

from collections.abc import Callable
from functools import partial

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.layers import GroupNormAct, ScaledStdConv2d, StdConv2d
from torch import Tensor, nn
from transferring import difference, lived

import normswap

pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor")
IMAGE = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
C = 32


def grouped(model: nn.Module) -> nn.Module:
    """Return a network of BatchNorm with GroupNorm in its place."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.GroupNorm(8, child.num_features))
    return model


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def kept(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


GROUPS = partial(nn.GroupNorm, 32)
BUILT: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "torchvision": (torchvision.models.resnet18, lambda: torchvision.models.resnet18(norm_layer=GROUPS)),
    "timm": (
        lambda: timm.create_model("resnet18"),
        lambda: timm.create_model("resnet18", norm_layer="groupnorm"),
    ),
    "timm, activations in norms": (
        lambda: timm.create_model("regnetx_002"),
        lambda: timm.create_model("regnetx_002", norm_layer=partial(GroupNormAct, num_groups=8)),
    ),
    "smp": (
        lambda: smp.Unet("resnet18", encoder_weights=None),
        lambda: grouped(smp.Unet("resnet18", encoder_weights=None)),
    ),
}


@pytest.mark.parametrize(("original", "target"), BUILT.values(), ids=BUILT.keys())
def test_computes_the_same(original: Callable[[], nn.Module], target: Callable[[], nn.Module]) -> None:
    converted = normswap.convert(lived(original()), example_input=IMAGE)
    theirs = target()
    assert difference(theirs, converted, IMAGE) > 0.01
    report = normswap.transfer(converted, theirs)
    assert difference(theirs, converted, IMAGE) < 1e-5
    other = torch.rand(3, 3, 96, 64)
    assert difference(theirs, converted, other) < 1e-5
    assert report.difference < 1e-5
    assert (report.not_set, report.unfilled) == ({}, ())


def test_what_no_state_dict_holds_is_measured() -> None:
    converted = normswap.convert(lived(torchvision.models.resnet18()), example_input=IMAGE)
    theirs = torchvision.models.resnet18(norm_layer=GROUPS)
    report = normswap.transfer(converted, theirs, example_input=IMAGE)
    again = torchvision.models.resnet18(norm_layer=GROUPS)
    again.load_state_dict(theirs.state_dict())
    x = torch.randn(IMAGE.shape, generator=torch.Generator().manual_seed(0))
    assert report.reloaded == pytest.approx(difference(again, converted, x), rel=0.01)
    assert report.reloaded > 0.05
    assert report.attributes["bn1"] == {"eps": converted.bn1.eps}
    assert theirs.bn1.eps == converted.bn1.eps
    assert f"built anew from its state dict alone: {report.reloaded:.1e}" in str(report)
    exact = normswap.convert(lived(torchvision.models.resnet18()), example_input=IMAGE, affine="copy")
    assert normswap.transfer(exact, again, example_input=IMAGE).reloaded < 1e-5


class Standardizing(nn.Conv2d):
    """As in mmcv's ConvWS2d: the unbiased deviation, epsilon outside the root."""

    def kernel(self) -> Tensor:
        rows = self.weight.flatten(1)
        centred = rows - rows.mean(1, keepdim=True)
        return (centred / (rows.std(1, keepdim=True) + 1e-5)).view_as(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel(), self.bias, self.stride, self.padding, self.dilation, self.groups)


class Adaptive(Standardizing):
    """As in mmcv's ConvAWS2d: two buffers bring scale and mean back."""

    def __init__(self, *args: int, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self.register_buffer("weight_gamma", torch.ones(self.out_channels, 1, 1, 1))
        self.register_buffer("weight_beta", torch.zeros(self.out_channels, 1, 1, 1))

    def kernel(self) -> Tensor:
        return self.weight_gamma * super().kernel() + self.weight_beta  # type: ignore[operator]


class Holding(nn.Conv2d):
    """As in detectron2: the convolution holds its norm and its activation."""

    def __init__(self, *args: int, norm: nn.Module, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(super().forward(x)))


class HardCoded(nn.Module):
    """A group normalization whose numbers are in its code."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, 4, self.weight, self.bias, 1e-5)


class Stack(nn.Module):
    """Modules with names of the framework's own."""

    def __init__(
        self, conv: Callable[..., nn.Module], norm: Callable[[int], nn.Module], bias: bool = False, prefix: str = "bn"
    ) -> None:
        super().__init__()
        self.prefix = prefix
        for index, inputs in enumerate((3, C, C)):
            self.add_module(f"conv{index}", conv(inputs, C, 3, padding=1, bias=bias))
            self.add_module(f"{prefix}{index}", norm(C))
        self.head = nn.Linear(C, 5)

    def forward(self, x: Tensor) -> Tensor:
        for index in range(3):
            x = F.relu(getattr(self, f"{self.prefix}{index}")(getattr(self, f"conv{index}")(x)))
        return self.head(x.mean((2, 3)))


def plain_stack(**options: object) -> nn.Module:
    return Stack(nn.Conv2d, nn.BatchNorm2d, **options)  # type: ignore[arg-type]


KERNELS = {
    "plain": (nn.Conv2d, "adaptive", "folded"),
    "plain, standard": (nn.Conv2d, "standard", "folded"),
    "standardizing": (Standardizing, "standard", "filters as they are, standardized there"),
    "timm's": (StdConv2d, "standard", "filters as they are, standardized there"),
    "timm's with a gain": (ScaledStdConv2d, "standard", "filters as they are, with gain and offset"),
    "adaptive": (Adaptive, "adaptive", "filters as they are, with gain and offset"),
    "adaptive, standard": (Adaptive, "standard", "filters as they are, with gain and offset"),
}


@pytest.mark.parametrize(("conv", "ws", "how"), KERNELS.values(), ids=KERNELS.keys())
def test_kernels_go_where_the_target_wants_them(conv: type[nn.Module], ws: str, how: str) -> None:
    converted = normswap.convert(lived(plain_stack()), example_input=IMAGE, ws=ws)
    with torch.no_grad():  # as training moves them
        for module in converted.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.mul_(1.5).add_(0.01 * torch.randn(module.weight.shape))
    target = Stack(conv, partial(nn.GroupNorm, 8), prefix="gn")
    report = normswap.transfer(converted, target, example_input=IMAGE)
    assert difference(target, converted, IMAGE) < 1e-4
    assert set(report.kernels.values()) == {how}
    if "as they are" in how:
        first = target.conv0.weight / converted.conv0.weight  # type: ignore[union-attr,operator]
        assert float((first - first.mean((1, 2, 3), keepdim=True)).abs().max()) < 1e-2


REFUSED: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], str]] = {
    "no gain": (
        plain_stack,
        lambda: Stack(Standardizing, partial(nn.GroupNorm, 8)),
        "conv0: whatever its filters, they make no kernel like that of conv0, .*; build the target with plain conv",
    ),
    "no bias": (
        lambda: plain_stack(bias=True),
        lambda: Stack(nn.Conv2d, partial(nn.GroupNorm, 8)),
        "conv0: it has no bias for that of conv0; build",
    ),
    "no affine part": (
        plain_stack,
        lambda: Stack(nn.Conv2d, lambda n: nn.GroupNorm(8, n, affine=False)),
        "bn0: it has no gain and offset for those of bn0; build it affine",
    ),
    "other layers": (
        plain_stack,
        lambda: nn.Sequential(nn.Conv2d(3, C, 3, padding=1), nn.GroupNorm(8, C), nn.Conv2d(C, 5, 3)),
        r"conv1 \(a convolution, \(32, 32, 3, 3\)\) runs where the target runs 2 \(a convolution, \(5, 32, 3, 3\)\)",
    ),
    "fewer layers": (
        plain_stack,
        lambda: nn.Sequential(nn.Conv2d(3, C, 3, padding=1), nn.GroupNorm(8, C)),
        "the converted network runs conv1 .*, for which the other has no layer",
    ),
    "another activation": (
        plain_stack,
        lambda: Other(nn.Conv2d, partial(nn.GroupNorm, 8)),
        "Other gets every tensor and its outputs still differ by",
    ),
}


class Other(Stack):
    def forward(self, x: Tensor) -> Tensor:
        for index in range(3):
            x = F.gelu(getattr(self, f"bn{index}")(getattr(self, f"conv{index}")(x)))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize(("original", "target", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_before_anything_is_changed(
    original: Callable[[], nn.Module], target: Callable[[], nn.Module], message: str
) -> None:
    converted = normswap.convert(lived(original()), example_input=IMAGE)
    theirs = target()
    before, epsilons = kept(theirs), [m.eps for m in theirs.modules() if isinstance(m, nn.GroupNorm)]
    ours = kept(converted)
    with pytest.raises(normswap.TransferFailed, match=message):
        normswap.transfer(converted, theirs, example_input=IMAGE)
    assert unchanged(theirs, before)
    assert unchanged(converted, ours)
    assert [m.eps for m in theirs.modules() if isinstance(m, nn.GroupNorm)] == epsilons


def test_a_bias_that_nothing_asks_for_is_zero() -> None:
    converted = normswap.convert(lived(plain_stack()), example_input=IMAGE)
    target = Stack(nn.Conv2d, partial(nn.GroupNorm, 8), bias=True)
    normswap.transfer(converted, target, example_input=IMAGE)
    assert not bool(target.conv0.bias.any())  # type: ignore[union-attr,operator]
    assert difference(target, converted, IMAGE) < 1e-5


def test_a_convolution_that_holds_its_norm() -> None:
    def build(norm: Callable[[int], nn.Module]) -> nn.Module:
        sizes = (3, C), (C, C), (C, 4)
        return nn.Sequential(*(Holding(a, b, 3, norm=norm(b), padding=1, bias=False) for a, b in sizes))

    converted = normswap.convert(lived(build(nn.BatchNorm2d)), example_input=IMAGE)
    target = build(partial(nn.GroupNorm, 2))
    report = normswap.transfer(converted, target, example_input=IMAGE)
    assert difference(target, converted, IMAGE) < 1e-5
    assert report.attributes["0.norm"]["num_groups"] == converted[0].norm.num_groups == 16


def test_what_cannot_be_set_is_named_and_measured() -> None:
    converted = normswap.convert(lived(plain_stack()), example_input=IMAGE)
    target = Stack(nn.Conv2d, HardCoded)
    report = normswap.transfer(converted, target, example_input=IMAGE)
    assert report.not_set.keys() == {"bn0", "bn1", "bn2"}
    assert report.not_set["bn0"].startswith("4 groups and epsilon 1e-05 instead of 16 groups and epsilon")
    x = torch.randn(IMAGE.shape, generator=torch.Generator().manual_seed(0))
    assert report.difference == pytest.approx(difference(target, converted, x), rel=0.01)
    assert report.difference > 1e-3
    assert "not set: bn0: 4 groups" in str(report)


def test_layers_that_no_pass_reaches_are_named() -> None:
    class Unused(Stack):
        def __init__(self) -> None:
            super().__init__(nn.Conv2d, partial(nn.GroupNorm, 8))
            self.auxiliary = nn.Linear(C, 7)

    converted = normswap.convert(lived(plain_stack()), example_input=IMAGE)
    assert normswap.transfer(converted, Unused(), example_input=IMAGE).unfilled == ("auxiliary",)
