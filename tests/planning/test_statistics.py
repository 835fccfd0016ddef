"""The statistics that a new norm meets."""

import pytest
import torch
from torch import nn

import normswap


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_bad_statistics_name_the_layer_and_change_nothing(bad: float) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    model[1].running_var[2] = bad
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(normswap.BadStatistics, match="^1: running statistics are negative or not finite"):
        normswap.convert(model, inplace=True)
    assert isinstance(model[1], nn.BatchNorm2d)
    assert all(torch.equal(value, before[key]) or bad != bad for key, value in model.state_dict().items())


def test_conv_bias_is_in_the_running_mean() -> None:
    conv, norm = nn.Conv2d(3, 16, 1, bias=True), nn.BatchNorm2d(16)
    nn.init.constant_(conv.bias, 5.0)  # type: ignore[arg-type]
    model = nn.Sequential(conv, norm).train()
    x = torch.randn(64, 3, 16, 16)
    for _ in range(200):
        model(x)
    model.eval()
    result = normswap.convert(model, to="layer")
    difference = (result(x) - model(x)).square().mean() / model(x).square().mean()
    assert difference < 0.05


def test_standard_form_takes_the_filters_scale_into_account() -> None:
    conv, norm = nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16)
    with torch.no_grad():
        conv.weight -= conv.weight.mean((1, 2, 3), keepdim=True)
        conv.weight *= torch.logspace(-1, 1, 16).view(-1, 1, 1, 1)
    model = nn.Sequential(conv, norm).train()
    x = torch.randn(64, 3, 16, 16)
    for _ in range(200):
        model(x)
    model.eval()
    result = normswap.convert(model, ws="standard", groups=4)
    assert (result(x) - model(x)).square().mean() < 0.05 * model(x).square().mean()
