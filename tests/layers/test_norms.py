"""GroupNormAct and ChannelScale."""

import pickle

import pytest
import torch
from equality import assert_same_output
from torch import nn

from normswap.layers.norms import ChannelScale, GroupNormAct


def test_group_norm_act_runs_what_it_carries_in_order() -> None:
    norm = GroupNormAct(2, 4, then={"drop": nn.Dropout(0.5), "act": nn.ReLU()})
    norm.eval()
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(norm(x), torch.relu(nn.functional.group_norm(x, 2)))
    assert_same_output(pickle.loads(pickle.dumps(norm))(x), norm(x))
    assert list(norm.state_dict()) == ["weight", "bias"]


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4), (2, 3, 4, 5), (1, 3, 2, 2, 2)], ids=str)
def test_channel_scale(shape: tuple[int, ...]) -> None:
    layer = ChannelScale(3, then={"act": nn.ReLU(), "drop": nn.Dropout()})
    layer.eval()
    x = torch.randn(shape)
    assert torch.equal(layer(x), x.relu())
    nn.init.uniform_(layer.weight)
    nn.init.uniform_(layer.bias)
    expected = torch.stack([(x[:, c] * layer.weight[c] + layer.bias[c]).relu() for c in range(3)], 1)
    torch.testing.assert_close(layer(x), expected)
    assert (layer.then, list(layer.state_dict())) == (("act", "drop"), ["weight", "bias"])
    assert ChannelScale(3).then == ()
    assert repr(ChannelScale(3, dtype=torch.float64)) == "ChannelScale(3)"
    double = ChannelScale(3, dtype=torch.float64)
    assert (double.weight.dtype, double.bias.dtype) == (torch.float64, torch.float64)


def test_norms_are_made_in_the_type_asked_for() -> None:
    norm = GroupNormAct(2, 4, then={}, eps=0.5, dtype=torch.float64)
    assert (norm.eps, norm.weight.dtype) == (0.5, torch.float64)
