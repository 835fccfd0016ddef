"""The statistics that a new norm meets: followed behind the standard form, or filters stay as they are."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normswap


class Apply(nn.Module):
    """A function of the input and of layers."""

    def __init__(self, function: Callable[..., Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.layers)


def conv(channels: int, kind: type[nn.Conv2d | nn.ConvTranspose2d] = nn.Conv2d, groups: int = 1) -> nn.Module:
    """Return a convolution of 8 channels whose filters have mean zero and very different sizes."""
    layer = kind(8, channels, 3, padding=1, groups=groups)
    with torch.no_grad():
        if kind is nn.Conv2d:
            layer.weight -= layer.weight.mean((1, 2, 3), keepdim=True)
            layer.weight *= torch.logspace(-0.7, 0.7, channels)[torch.randperm(channels)].view(-1, 1, 1, 1)
        else:  # (inputs, outputs / groups, 3, 3): a filter runs over the inputs of its group
            rows = layer.weight.unflatten(0, (groups, -1))
            rows -= rows.mean((1, 3, 4), keepdim=True)
            rows *= torch.logspace(-0.7, 0.7, channels).view(groups, 1, -1, 1, 1)
    return layer


PATHS: dict[str, tuple[Callable[[], list[nn.Module]], bool]] = {
    "conv": (lambda: [conv(32)], True),
    "transposed": (lambda: [conv(32, nn.ConvTranspose2d)], True),
    "transposed, grouped": (lambda: [conv(32, nn.ConvTranspose2d, groups=2)], True),
    "shuffled": (lambda: [conv(32), Apply(lambda x: F.channel_shuffle(x, 4))], False),
    "shifted": (lambda: [conv(32), Apply(lambda x: x + 3)], False),
    "scaled": (lambda: [conv(32), Apply(lambda x: x * 3)], False),
    "unfolded": (lambda: [conv(128), nn.PixelShuffle(2)], False),
    "concatenated": (lambda: [Apply(lambda x, a, b: torch.cat([a(x), b(x)], 1), conv(16), conv(16))], False),
    "beside its input": (lambda: [Apply(lambda x, a: torch.cat([x, a(x)], 1), conv(24))], False),
    "added": (lambda: [Apply(lambda x, a, b: a(x) + b(x), conv(32), conv(32))], False),
}


@pytest.mark.parametrize(("layers", "standard"), PATHS.values(), ids=PATHS)
def test_the_standard_form_is_matched_or_not_taken(layers: Callable[[], list[nn.Module]], standard: bool) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(*layers(), nn.BatchNorm2d(32, momentum=None)), torch.randn(1, 8, 24, 24)
    model(x)  # the running statistics are this sample's
    model.eval()
    converted = normswap.convert(model, example_input=x, ws="standard", shrink=0)
    assert ((converted(x) - model(x)).norm() / model(x).norm()).item() < 2e-3
    forms = {entry.ws for entry in normswap.plan_of(converted).convs}
    assert forms == {"standard" if standard else "adaptive"}
    if not standard:
        assert "behind the standard form is not known" in normswap.plan_of(converted).convs[0].reason


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
