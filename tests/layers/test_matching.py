"""The closed form."""

import pytest
import torch
from torch import Tensor, nn

import normswap
from normswap.layers.matching import centred, closed_form, damping, drift, group_moments, scale_and_shift


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


@pytest.mark.parametrize("shrink", [0, 0.5, 3])
@pytest.mark.parametrize("groups", [1, 2, 4, 8, "auto"])
def test_exact_where_a_sample_has_the_running_statistics(groups: int | str, shrink: float) -> None:
    norm = trained(nn.BatchNorm2d(16))
    x = sample_with_running_statistics(norm)
    result = normswap.convert(norm, groups=groups, shrink=shrink, example_input=x.float())
    torch.testing.assert_close(result.double()(x), norm.double()(x), rtol=1e-5, atol=1e-5)


def test_copy_is_far_off_on_the_same_sample() -> None:
    norm = trained(nn.BatchNorm2d(16))
    x = sample_with_running_statistics(norm)
    result = normswap.convert(norm, groups=4, affine="copy", example_input=x.float())
    assert torch.equal(result.weight, norm.weight)  # type: ignore[arg-type]
    assert (result.double()(x) - norm.double()(x)).abs().max() > 0.5


def test_constant_channels_do_not_amplify() -> None:
    values = [torch.tensor(v) for v in ([1.0, 1.0], [0.5, 0.5], [3.0, 0.0], [0.0, 1.0])]
    gamma, beta = closed_form(*values, eps=1e-5, norm_eps=1e-5, num_groups=1)
    assert gamma[0] == 1.0  # not 1/√eps = 316 times as much
    group_mean, group_std = 1.5, (0.5 * (1 + 2.25 + 2.25) + 1e-5 - 0.0) ** 0.5
    assert gamma[0] * (3.0 - group_mean) / group_std + beta[0] == pytest.approx(0.5, abs=0.3)


def test_tiny_variance_is_constant_too() -> None:
    norm = trained(nn.BatchNorm2d(16, eps=1e-12))
    norm.running_var[3] = 1e-13  # type: ignore[index]
    result = normswap.convert(norm, groups=1, shrink=0, example_input=torch.zeros(2, 16, 8, 8))
    assert result.weight.abs().max() < 100  # type: ignore[operator, union-attr]


def moved(norm: nn.BatchNorm2d, groups: int, shrink: float) -> float:
    """Measure, on samples whose channels are normal and independent, what `drift` estimates."""
    generator = torch.Generator().manual_seed(1)
    mean, std = norm.running_mean.double(), norm.running_var.double().sqrt()  # type: ignore[union-attr]
    x = torch.randn(20000, norm.num_features, generator=generator, dtype=torch.float64) * std + mean
    result = normswap.convert(norm, groups=groups, shrink=shrink, example_input=torch.zeros(2, norm.num_features, 4, 4))
    off = result.double()(x) - torch.nn.functional.batch_norm(
        x, mean, std.square(), norm.weight.double(), norm.bias.double(), eps=norm.eps
    )
    gain = norm.weight.double() / (std.square() + norm.eps).sqrt()
    return (off.square().mean(0).sum() / (gain * std).square().sum()).sqrt().item()


@pytest.mark.parametrize("shrink", [0, 0.5, 5])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_drift_foretells_what_independent_samples_show(groups: int, shrink: float) -> None:
    norm = trained(nn.BatchNorm2d(64))
    plan = normswap.inspect(norm, groups=groups, shrink=shrink, example_input=torch.zeros(2, 64, 4, 4))
    assert plan.norms[0].drift == pytest.approx(moved(norm, groups, shrink), rel=0.15)


def test_drift_falls_with_larger_groups_and_stronger_shrinking() -> None:
    ones, zeros = torch.ones(32), torch.zeros(32)
    by_groups = [drift(ones, zeros, ones, eps=0, norm_eps=0, num_groups=groups) for groups in (1, 4, 32)]
    assert by_groups == sorted(by_groups)
    assert by_groups[2] == pytest.approx(1.5**0.5)  # one channel per group: its mean, and half its variance again
    by_eps = [drift(ones, zeros, ones, eps=0, norm_eps=eps, num_groups=4) for eps in (10, 1, 0)]
    assert by_eps == sorted(by_eps)


def test_centred_filters_are_standardized_up_to_one_factor() -> None:
    rows = torch.randn(8, 27) * torch.rand(8, 1) + 0.3
    result = centred(rows)
    std = result.std(1, correction=0)
    assert result.mean(1).abs().max() < 1e-6
    torch.testing.assert_close(std, std[:1].expand(8))
    torch.testing.assert_close(std[0], rows.std(1, correction=0).square().mean().sqrt())


def test_group_moments_by_hand() -> None:
    """Channels of mean 1 and 3, variance 2 and 4: mean 2, and 3 within them plus 1 between them."""
    mean, var = torch.tensor([[1.0, 3], [5, 5]]), torch.tensor([[2.0, 4], [0, 6]])
    assert [part.flatten().tolist() for part in group_moments(mean, var)] == [[2, 5], [4, 3]]


def test_damping_by_hand() -> None:
    """Group variances of 4 and 3, averaged; several norms at a time."""
    mean, var = torch.tensor([1.0, 3, 5, 5]), torch.tensor([2.0, 4, 0, 6])
    assert damping(mean, var, shrink=2, num_groups=2).item() == 7
    assert damping(torch.stack([mean, 0 * mean]), torch.stack([var, var]), shrink=2, num_groups=2).tolist() == [7, 6]
    assert damping(mean, var, shrink=0, num_groups=2).item() == 0


def test_closed_form_by_hand() -> None:
    weight, bias = torch.tensor([1.0, -2]), torch.tensor([0.5, 0])
    mean, var = torch.tensor([1.0, 3]), torch.tensor([2.0, 4])
    gamma, beta = closed_form(weight, bias, mean, var, eps=2, norm_eps=12, num_groups=1)  # sigma is sqrt(4 + 12)
    assert gamma.tolist() == pytest.approx([4 / 2, -8 / 6**0.5])
    assert beta.tolist() == pytest.approx([0.5 + 1 / 2, 2 / 6**0.5])
    assert gamma.dtype == torch.float32


@pytest.mark.parametrize(
    ("share", "eps", "alive"),
    [(0.9e-8, 1e-4, False), (1.1e-8, 1e-4, True), (0.9e-8, 1e-9, True), (2e-30, 0, False), (4e-30, 0, True)],
    ids=["silent", "not quiet enough", "heard", "rounding", "above rounding"],
)
def test_where_a_channel_counts_as_constant(share: float, eps: float, alive: bool) -> None:
    var = torch.tensor([share, 2 - share], dtype=torch.float64)
    ones, zeros = torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    gamma, _ = closed_form(ones, zeros, zeros, var, eps=eps, norm_eps=0, num_groups=1)
    assert gamma[0].item() == pytest.approx((share + eps) ** -0.5 if alive else 1)
    moved = drift(ones, zeros, var, eps=eps, norm_eps=0, num_groups=1)
    assert (moved.item() > 10) is alive


def test_drift_by_hand() -> None:
    """Two channels of mean 0 and 2, variance 1 and 3, in one group: mean 1, variance 3."""
    weight, mean, var = torch.tensor([1.0, 2]), torch.tensor([0.0, 2]), torch.tensor([1.0, 3])
    mean_moves, var_moves = 2 / 2, ((2 + 4) + (18 + 12)) / 2 / 2
    gain = [1 / (1 + 0.5), 4 / (3 + 0.5)]
    moved = sum(g * (mean_moves + (v + 1) * var_moves / (4 * (3 + 1) ** 2)) for g, v in zip(gain, (1, 3), strict=True))
    varied = sum(g * v for g, v in zip(gain, (1, 3), strict=True))
    found = drift(weight, mean, var, eps=0.5, norm_eps=1, num_groups=1)
    assert found.item() == pytest.approx((moved / varied) ** 0.5)
    several = drift(
        torch.stack([weight] * 2), torch.stack([mean] * 2), torch.stack([var] * 2), eps=torch.tensor([0.5, 0.5]),
        norm_eps=torch.tensor([1.0, 1.0]), num_groups=1,
    )  # fmt: skip
    assert several.tolist() == pytest.approx([found.item()] * 2)
    assert drift(0 * weight, mean, var, eps=0.5, norm_eps=1, num_groups=1) == 0
    assert drift(weight, mean, 0 * var, eps=0.5, norm_eps=1, num_groups=1) == 0


def test_scale_and_shift_by_hand() -> None:
    scale, shift = scale_and_shift(*map(torch.tensor, ([6.0], [1.0], [2.0], [3.0])), eps=1)
    assert (scale.tolist(), shift.tolist()) == ([3], [-5])
    half = torch.ones(1, dtype=torch.float16)
    assert {t.dtype for t in scale_and_shift(half, half, half.float(), half.float(), eps=0)} == {torch.float16}


def drawn_norms() -> list[torch.Tensor]:
    """Weight, bias, mean and variance of three norms of eight channels."""
    shape = (3, 8)
    return [torch.randn(shape), torch.randn(shape), torch.randn(shape), torch.rand(shape) + 0.1]


def test_norms_of_one_size_together_are_as_each_alone() -> None:
    weight, bias, mean, var = drawn_norms()
    eps, norm_eps = torch.tensor([1e-5, 1e-3, 0.1]), torch.tensor([0.5, 0.1, 2])
    together = closed_form(weight, bias, mean, var, eps=eps, norm_eps=norm_eps, num_groups=4)
    scaled, drifts = scale_and_shift(weight, bias, mean, var, eps=eps), drift(
        weight, mean, var, eps=eps, norm_eps=norm_eps, num_groups=4
    )  # fmt: skip
    for i in range(3):
        one, own, own_norm = (weight[i], bias[i], mean[i], var[i]), float(eps[i]), float(norm_eps[i])
        alone = closed_form(*one, eps=own, norm_eps=own_norm, num_groups=4)
        assert all(torch.equal(a[i], b) for a, b in zip(together, alone, strict=True))
        assert all(torch.equal(a[i], b) for a, b in zip(scaled, scale_and_shift(*one, eps=own), strict=True))
        expected = drift(weight[i], mean[i], var[i], eps=own, norm_eps=own_norm, num_groups=4)
        assert drifts[i].item() == pytest.approx(expected.item())


QUIET: dict[str, tuple[list[float], list[float], torch.dtype, bool]] = {
    "beside one of large mean": ([3e4, 0, 1, -1], [1e2, 1, 2, 0.5], torch.float32, True),
    "beside a time stamp": ([1.7e9, 0, 40, 1], [1e12, 1, 150, 0.25], torch.float64, True),
    "beside loud ones": ([0, 0, 0, 0], [1e-4, 1e8, 1e8, 1e8], torch.float64, True),
    "silenced by epsilon": ([0, 0, 0, 0], [1e-10, 1, 1, 1], torch.float32, False),
    "lost in rounding": ([0, 0, 0, 0], [1e-4, 1e10, 1e10, 1e10], torch.float32, False),
}


@pytest.mark.parametrize(("mean", "var", "dtype", "heard"), QUIET.values(), ids=QUIET)
def test_a_quiet_channel_that_batch_norm_hears_stays(
    mean: list[float], var: list[float], dtype: torch.dtype, heard: bool
) -> None:
    norm = nn.BatchNorm2d(4).to(dtype).eval()
    norm.running_mean.copy_(torch.tensor(mean))  # type: ignore[union-attr]
    norm.running_var.copy_(torch.tensor(var))  # type: ignore[union-attr]
    x = torch.randn(2, 4, 16, 16, dtype=torch.float64)
    x = (x - x.mean((2, 3), keepdim=True)) / x.std((2, 3), correction=0, keepdim=True)
    x = x * torch.tensor(var).double().sqrt().view(-1, 1, 1) + torch.tensor(mean).double().view(-1, 1, 1)
    converted = normswap.convert(norm, example_input=x.to(dtype), groups=1)
    kept = (converted(x.to(dtype)).std((0, 2, 3)) / norm(x.to(dtype)).std((0, 2, 3)))[0].item()
    assert kept == pytest.approx(1, rel=0.1) if heard else kept < 0.5
    shown = normswap.plan_of(converted).norms[0].drift
    assert shown is not None
    told = [line for line in normswap.plan_of(converted).warnings if "channel 0 is lost in the rounding" in line]
    assert bool(told) == ((mean, var) == QUIET["lost in rounding"][:2])
    assert shown > 0.4  # a sample's own statistics move it, or it is lost; silent ones leave it at that of the others
