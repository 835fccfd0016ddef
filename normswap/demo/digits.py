"""The small real net and data of ``normswap demo``: a BatchNorm ResNet trained on 8x8 handwritten digits."""

from importlib.resources import files

import torch
import torch.nn.functional as F
from safetensors.torch import load
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, each behind BatchNorm (He et al. 2016, figure 2).

    Args:
        inputs: Channels of the input, shape (N, inputs, H, W).
        channels: Channels of the output, shape (N, channels, H/stride, W/stride).
        stride: Of the first convolution and of the shortcut.
    """

    def __init__(self, inputs: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return features (N, channels, H/stride, W/stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class DigitsResNet(nn.Module):
    """A BatchNorm ResNet of 8 convolutions and 74,346 parameters: 32 channels at 8x8, then 48 channels at 4x4."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.layer1 = nn.Sequential(BasicBlock(32, 32), BasicBlock(32, 32))
        self.layer2 = nn.Sequential(BasicBlock(32, 48, stride=2))
        self.fc = nn.Linear(48, 10)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, BasicBlock):
                nn.init.zeros_(module.bn2.weight)  # every block starts as its shortcut (Goyal et al. 2017, section 5.1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, 10) for images (N, 1, 8, 8) with values in [-1, 1]."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer2(self.layer1(x))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def digits_resnet(pretrained: bool = True) -> DigitsResNet:
    """Return the net in eval mode with the weights of this package, or freshly initialized and in training mode."""
    model = DigitsResNet()
    if pretrained:
        model.load_state_dict(_stored("digits_resnet.safetensors"))
        model.eval()
    return model


def load_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return 1,026 training images and their labels, then 771 test images and theirs; training never saw the latter.

    Images are float32 (N, 1, 8, 8) from -1 (paper) to 1 (ink), labels int64 (N,) from 0 to 9.
    """
    stored = _stored("digits.safetensors")
    return split_digits(stored["images"], stored["labels"])


def split_digits(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scale uint8 images (N, 8, 8) of values 0 to 16 and split them as `load_digits` returns them.

    The first three of every seven images are for test. Labels often run from 0 to 9 in order; a period that shares no
    factor with ten gives both parts every digit alike.
    """
    scaled = (images.float().unsqueeze(1) - 8) / 8
    test = torch.arange(len(images)) % 7 < 3
    return scaled[~test], labels[~test].long(), scaled[test], labels[test].long()


def _stored(name: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load(files("normswap.demo").joinpath("data", name).read_bytes())
    return tensors
