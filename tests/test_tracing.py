"""Forward passes that meta tensors alone cannot make."""

import pytest
import torch
import torchvision
from nets import Net, conv
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

import normswap
from normswap.networks.network import Network
from normswap.networks.recognition import is_batch_norm
from normswap.tracing.forward import trace

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


class Counting(Net):
    """Asks for values, indexes by a mask, and loops over what it found."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.a(x))
        if y.max().item() > 0 and torch.equal(x, x):
            y = y + 1
        rows = y.flatten(1)[y.flatten(1).sum(1) != 0]
        found = torch.nonzero(rows > 0)
        return self.bn2(self.b(y))[:, :, : max(int(found.shape[0] > 0), 1)]


def test_data_dependent_operators_are_answered() -> None:
    model = Counting(a=conv(), b=conv(8), bn1=nn.BatchNorm2d(8), bn2=nn.BatchNorm2d(8))
    plan = normswap.inspect(model)
    assert [entry.fed_by for entry in plan.norms] == [("a",), ("b",)]


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


def test_falls_back_without_an_example_too() -> None:
    model = ThroughNumpy(a=conv(), b=conv(8), bn1=nn.BatchNorm2d(8), bn2=nn.BatchNorm2d(8))
    assert len(normswap.inspect(model).changes) == 4


def test_stops_after_the_last_norm_are_reported() -> None:
    class Breaks(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = self.bn(self.a(x))
            raise ValueError("no boxes")
            return y

    plan = normswap.inspect(Breaks(a=conv(), bn=nn.BatchNorm2d(8)))
    assert plan.warnings == ("the forward pass stopped after the last norm (ValueError: no boxes)",)


def test_sizes_and_channels_that_the_first_layer_does_not_tell() -> None:
    class Fixed(Net):
        in_size = (24, 40)

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[-2:] != self.in_size:
                raise ValueError("another size")
            return self.bn(self.a(x))

    class LaterFirst(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.b(torch.relu(self.a(x))))

    assert normswap.inspect(Fixed(a=conv(), bn=nn.BatchNorm2d(8))).norms[0].shape == (2, 8, 24, 40)
    assert normswap.inspect(LaterFirst(b=conv(8), a=conv(3), bn=nn.BatchNorm2d(8))).norms[0].groups == 4


def test_norm_called_past_its_hooks() -> None:
    class Direct(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn.forward(self.a(x))

    model = Direct(a=conv(), bn=nn.BatchNorm2d(8))
    assert [node.name for node in trace(Network(model)).norms["bn"].fed_by] == ["a"]
    assert isinstance(normswap.convert(model).bn, nn.GroupNorm)


def test_kernel_used_outside_its_layer_is_left() -> None:
    class Borrowed(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn(nn.functional.conv2d(x, self.a.weight, padding=1))

    plan = normswap.inspect(Borrowed(a=conv(), bn=nn.BatchNorm2d(8)))
    assert "read outside its own" in plan.convs[0].reason


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
