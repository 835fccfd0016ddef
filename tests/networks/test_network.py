"""One look at a model."""

import torch
from torch import Tensor, nn

import normswap
from normswap.networks.network import Network


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.again = nn.ModuleList([self.bn, nn.InstanceNorm2d(8, track_running_stats=True), nn.Conv1d(1, 1, 1)])

    def forward(self, x: Tensor) -> Tensor:
        return self.again[0](self.conv(x))


def test_names_aliases_norms_and_convolutions() -> None:
    model = Shared()
    network = Network(model)
    assert list(network.slots) == ["", "conv", "bn", "again", "again.0", "again.1", "again.2"]
    assert list(network.modules) == ["", "conv", "bn", "again", "again.1", "again.2"]
    assert list(network.norms) == ["bn"]
    assert list(network.convs) == ["conv", "again.2"]
    assert network.aliases("bn") == ("again.0",)
    assert network.aliases("conv") == ()
    assert network.name(model.again[0]) == "bn"
    assert network.kind == "Shared"
    assert list(network.standardized()) == []


def test_a_converted_network_shows_its_standardized_convolutions() -> None:
    network = Network(normswap.convert(Shared(), example_input=torch.zeros(2, 3, 8, 8)))
    assert [name for name, _ in network.standardized()] == ["conv"]
    assert list(network.convs) == ["conv", "again.2"]
    assert not network.norms


def test_a_module_that_is_a_norm_itself() -> None:
    assert list(Network(nn.BatchNorm1d(3)).norms) == [""]
