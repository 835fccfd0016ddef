"""The network that most packages are tried on."""

import pytest
from nets import SMALL_IMAGES, moved, small_resnet
from torch import nn

import normswap


@pytest.fixture
def trained() -> nn.Module:
    """A converted network whose filters have moved since."""
    return moved(normswap.convert(small_resnet(), example_input=SMALL_IMAGES))
