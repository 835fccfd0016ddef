"""The closed form."""

import pytest
import torch
from torch import Tensor, nn

import normswap
from normswap.matching import centred, closed_form


def trained(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    """Give a norm statistics and an affine part that differ by channel."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor, low in ((norm.weight, 0.5), (norm.bias, -1.0), (norm.running_mean, -2.0), (norm.running_var, 0.1)):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 2 + low)  # type: ignore[union-attr]
    return norm.eval()


def sample_with_running_statistics(norm: nn.BatchNorm2d, side: int = 8) -> Tensor:
    """One image whose channels have exactly the norm's running mean and variance."""
    x = torch.randn(1, norm.num_features, side, side, dtype=torch.float64)
    x = (x - x.mean((2, 3), keepdim=True)) / x.std((2, 3), correction=0, keepdim=True)
    mean, std = norm.running_mean.double(), norm.running_var.double().sqrt()  # type: ignore[union-attr]
    return x * std[:, None, None] + mean[:, None, None]


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_exact_where_a_sample_has_the_running_statistics(groups: int) -> None:
    norm = trained(nn.BatchNorm2d(16))
    x = sample_with_running_statistics(norm)
    result = normswap.convert(norm, groups=groups, example_input=x.float())
    torch.testing.assert_close(result.double()(x), norm.double()(x), rtol=1e-5, atol=1e-5)


def test_copy_is_far_off_on_the_same_sample() -> None:
    norm = trained(nn.BatchNorm2d(16))
    x = sample_with_running_statistics(norm)
    result = normswap.convert(norm, groups=4, affine="copy", example_input=x.float())
    assert torch.equal(result.weight, norm.weight)  # type: ignore[arg-type]
    assert (result.double()(x) - norm.double()(x)).abs().max() > 0.5


def test_constant_channels_do_not_amplify() -> None:
    values = [torch.tensor(v) for v in ([1.0, 1.0], [0.5, 0.5], [3.0, 0.0], [0.0, 1.0])]
    gamma, beta = closed_form(*values, eps=1e-5, num_groups=1)
    assert gamma[0] == 1.0  # not 1/√eps = 316 times as much
    group_mean, group_std = 1.5, (0.5 * (1 + 2.25 + 2.25) + 1e-5 - 0.0) ** 0.5
    assert gamma[0] * (3.0 - group_mean) / group_std + beta[0] == pytest.approx(0.5, abs=0.3)


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


def test_fresh_norms_keep_their_affine_part() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    plan = normswap.inspect(model)
    assert plan.norms[0].affine == "copy"
    assert plan.convs[0].ws == "standard"
    trained(model[1])
    plan = normswap.inspect(model)
    assert plan.norms[0].affine == "match"
    assert plan.convs[0].ws == "adaptive"


def test_centred_filters_are_standardized_up_to_one_factor() -> None:
    rows = torch.randn(8, 27) * torch.rand(8, 1) + 0.3
    result = centred(rows)
    std = result.std(1, correction=0)
    assert result.mean(1).abs().max() < 1e-6
    torch.testing.assert_close(std, std[:1].expand(8))
    torch.testing.assert_close(std[0], rows.std(1, correction=0).square().mean().sqrt())
