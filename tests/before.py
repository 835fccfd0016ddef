"""The network of the checkpoint in written_before/, which an earlier commit wrote."""

import torch
from torch import Tensor, nn

X = (2, 3, 12, 12)


class Branches(nn.Module):
    """A convolution, two branches (one of them depthwise) behind one norm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.branch1 = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.branch2 = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.bn, self.head = nn.BatchNorm2d(16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        y = torch.cat([self.branch1(y), self.branch2(y).relu()], 1)
        return self.head(self.bn(y).relu().mean((2, 3)))


def network() -> nn.Module:
    """Return the unconverted network, fresh."""
    return Branches()
