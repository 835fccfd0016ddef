"""Example inputs made up from a model."""

import torch
from nets import Net, conv
from torch import Tensor, nn

import normswap


class ThroughNumpy(Net):
    """Leaves torch on the way, which only real tensors survive."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.a(x))
        scale = float(y.detach().numpy().ndim)
        return self.bn2(self.b(y)) * scale


def test_falls_back_without_an_example_too() -> None:
    model = ThroughNumpy(a=conv(), b=conv(8), bn1=nn.BatchNorm2d(8), bn2=nn.BatchNorm2d(8))
    assert len(normswap.inspect(model).changes) == 4


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
