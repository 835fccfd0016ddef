"""Networks that mmcv and MONAI build with GroupNorm and their own standardized convolutions, filled by transfer."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transferring import difference, lived

import normswap

pytestmark = pytest.mark.filterwarnings("ignore")
IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
VOLUME = torch.randn(1, 1, 32, 32, 32, generator=torch.Generator().manual_seed(0))


def mm_network(norm: dict[str, Any], conv: dict[str, Any] | None = None) -> nn.Module:
    """Return a stack and a residual block of mmcv's ConvModule, as mmdet and mmpretrain build them from dicts."""
    ConvModule = pytest.importorskip("mmcv.cnn", reason="needs libGL", exc_type=ImportError).ConvModule  # noqa: N806

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            common = {"conv_cfg": conv, "norm_cfg": norm, "padding": 1}
            self.stem = ConvModule(3, 32, 3, **common)
            self.first = ConvModule(32, 64, 3, stride=2, **common)
            self.second = ConvModule(64, 64, 3, act_cfg=None, **common)
            self.head = nn.Linear(64, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(self.stem(x))
            return self.head(torch.relu(x + self.second(x)).mean((2, 3)))

    return Block()


MM = {
    "Conv": (None, "adaptive", "folded"),
    "ConvWS": ({"type": "ConvWS"}, "standard", "filters as they are, standardized there"),
    "ConvAWS": ({"type": "ConvAWS"}, "adaptive", "filters as they are, with gain and offset"),
}


@pytest.mark.parametrize(("conv", "ws", "how"), MM.values(), ids=MM.keys())
def test_mmcv(conv: dict[str, Any] | None, ws: str, how: str) -> None:
    converted = normswap.convert(lived(mm_network({"type": "BN"})), example_input=IMAGE, ws=ws)
    target = mm_network({"type": "GN", "num_groups": 32}, conv)
    assert difference(target, converted, IMAGE) > 0.01
    report = normswap.transfer(converted, target, example_input=IMAGE)
    found = difference(target, converted, IMAGE)
    print(f"{found:.1e}")
    assert found < 1e-5
    assert set(report.kernels.values()) == {how}


def test_mmcv_standardization_without_a_gain_cannot_take_every_kernel() -> None:
    converted = normswap.convert(lived(mm_network({"type": "BN"})), example_input=IMAGE, ws="adaptive")
    target = mm_network({"type": "GN", "num_groups": 32}, {"type": "ConvWS"})
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(
        normswap.TransferFailed, match="stem.conv: whatever its filters, they make no kernel like that of"
    ):
        normswap.transfer(converted, target, example_input=IMAGE)
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())


def unet(norm: Any) -> nn.Module:
    from monai.networks.nets import UNet

    return UNet(3, 1, 8, channels=(8, 16, 32), strides=(2, 2), num_res_units=2, norm=norm)


def basic_unet(norm: Any) -> nn.Module:
    from monai.networks.nets import BasicUNet

    return BasicUNet(3, 1, 2, features=(8, 8, 16, 32, 64, 8), norm=norm)


def segresnet(norm: Any) -> nn.Module:
    from monai.networks.nets import SegResNet

    return SegResNet(3, 8, 1, 2, norm=norm)


@pytest.mark.parametrize("build", [unet, basic_unet, segresnet], ids=lambda build: build.__name__)
def test_monai(build: Callable[[Any], nn.Module]) -> None:
    converted = normswap.convert(lived(build("batch")), example_input=VOLUME)
    target = build(("group", {"num_groups": 8}))
    assert difference(target, converted, VOLUME) > 0.01
    normswap.transfer(converted, target, example_input=VOLUME)
    found = difference(target, converted, VOLUME)
    print(f"{found:.1e}")
    assert found < 1e-5
