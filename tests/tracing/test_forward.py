"""Forward passes that meta tensors alone cannot make."""

import pytest
import torch
import torchvision
from nets import Net, conv
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

import normswap
from normswap.networks.recognition import is_batch_norm

DETECTION = [
    "fasterrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn",
    "ssdlite320_mobilenet_v3_large",
    "retinanet_resnet50_fpn",
]


@pytest.mark.parametrize("name", DETECTION)
def test_detection(name: str) -> None:
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None)
    result = normswap.convert(model)
    assert not any(is_batch_norm(module) for module in result.modules())


def test_frozen_backbone_keeps_its_function() -> None:
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    model = torchvision.models.detection.FasterRCNN(backbone, num_classes=5).eval()
    norms = sum(is_batch_norm(module) for module in model.modules())
    result = normswap.convert(model)
    assert norms == 20
    assert sum(isinstance(module, nn.GroupNorm) for module in result.modules()) == 20
    outputs = result([torch.rand(3, 64, 64), torch.rand(3, 80, 64)])
    assert len(outputs) == 2


def test_pairs_of_images() -> None:
    result = normswap.convert(torchvision.models.get_model("raft_large", weights=None).eval())
    assert isinstance(normswap.plan_of(result).inputs["tuple"], list)


class ThroughNumpy(Net):
    """Leaves torch on the way, which only real tensors survive."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.a(x))
        scale = float(y.detach().numpy().ndim)
        return self.bn2(self.b(y)) * scale


def test_falls_back_to_real_tensors() -> None:
    model = ThroughNumpy(a=conv(), b=conv(8), bn1=nn.BatchNorm2d(8), bn2=nn.BatchNorm2d(8))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    result = normswap.convert(model, example_input=torch.zeros(2, 3, 8, 8))
    assert [entry.fed_by for entry in normswap.plan_of(result).norms] == [("a",), ("b",)]
    assert normswap.check(result, model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_stops_after_the_last_norm_are_reported() -> None:
    class Breaks(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = self.bn(self.a(x))
            raise ValueError("no boxes")
            return y

    plan = normswap.inspect(Breaks(a=conv(), bn=nn.BatchNorm2d(8)))
    assert plan.warnings == ("the forward pass stopped after the last norm (ValueError: no boxes)",)


@pytest.mark.parametrize("wrap", ["autocast", "checkpoint"])
def test_autocast_and_checkpointing_inside(wrap: str) -> None:
    class Wrapped(Net):
        def forward(self, x: Tensor) -> Tensor:
            if wrap == "autocast":
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    return self.bn(self.a(x))
            return torch.utils.checkpoint.checkpoint(lambda t: self.bn(self.a(t)), x, use_reentrant=False)

    plan = normswap.inspect(Wrapped(a=conv(), bn=nn.BatchNorm2d(8)))
    assert [entry.action for entry in plan.entries] == ["standardize", "group_norm"]
