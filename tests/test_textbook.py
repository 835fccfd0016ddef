"""Examples a reader can work out by hand."""

import pytest
import torch
from torch import Tensor, nn

import normswap
from normswap.layers.standardization import standardize


def constant_maps() -> Tensor:
    """One sample of four 2×2 maps that hold 1, 2, 3 and 4."""
    return torch.arange(1.0, 5.0).view(1, 4, 1, 1).expand(1, 4, 2, 2)


def swapped(norm: nn.Module, **options: object) -> nn.Module:
    return normswap.convert(norm, example_input=torch.zeros(2, 4, 8, 8), **options).eval()  # type: ignore[arg-type]


def per_channel(output: Tensor) -> list[float]:
    return [round(value, 2) for value in output.mean((0, 2, 3)).tolist()]


def test_two_groups_of_two() -> None:
    """Groups are neighbours, {1, 2} and {3, 4}: −1, +1, −1, +1. Groups {1, 3} and {2, 4} would give −1, −1, +1, +1."""
    torch.testing.assert_close(
        nn.GroupNorm(2, 4, eps=0)(constant_maps()).mean((0, 2, 3)), torch.tensor([-1.0, 1, -1, 1])
    )
    assert per_channel(swapped(nn.BatchNorm2d(4), groups=2)(constant_maps())) == [-1, 1, -1, 1]


def test_group_norm_averages_neighbours() -> None:
    maps = torch.tensor([1.0, 1, 3, 3]).view(1, 4, 1, 1).expand(1, 4, 2, 2)
    assert per_channel(swapped(nn.BatchNorm2d(4), groups=1)(maps)) == [-1, -1, 1, 1]


def test_instance_norm_erases_constant_maps() -> None:
    assert per_channel(swapped(nn.BatchNorm2d(4), to="instance")(constant_maps())) == [0, 0, 0, 0]


def test_layer_norm_is_one_group() -> None:
    norm = swapped(nn.BatchNorm2d(4), to="layer")
    assert isinstance(norm, nn.GroupNorm)
    assert norm.num_groups == 1
    assert per_channel(norm(constant_maps())) == [-1.34, -0.45, 0.45, 1.34]


def test_64_channels_in_4_groups_are_blocks_of_16_neighbours() -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 1), nn.BatchNorm2d(64))
    norm = normswap.convert(model, group_size=16)[1]  # type: ignore[index]
    x = torch.randn(1, 64, 8, 8)
    means = norm(x).view(1, 4, 16, 8, 8).mean((0, 2, 3, 4))
    assert norm.num_groups == 4
    assert means.abs().max() < 1e-5
    assert norm(x)[:, :16].equal(norm(torch.cat([x[:, :16], torch.randn(1, 48, 8, 8)], 1))[:, :16])


def test_batch_norm_1d_on_flat_images() -> None:
    model = nn.Sequential(nn.Linear(784, 784), nn.BatchNorm1d(784), nn.ReLU())
    result = normswap.convert(model)
    assert isinstance(result[1], nn.GroupNorm)  # type: ignore[index]
    assert result(torch.randn(1, 784)).shape == (1, 784)


@pytest.mark.parametrize("fan_in", [4, 27, 576])
def test_weight_standardization_is_the_papers(fan_in: int) -> None:
    rows = torch.randn(8, fan_in)
    std, mean = torch.std_mean(rows, dim=1, keepdim=True)
    paper = (rows - mean) / (std + 1e-5)
    torch.testing.assert_close(standardize(rows), paper * (fan_in / (fan_in - 1)) ** 0.5, rtol=1e-4, atol=1e-4)


def test_no_running_statistics_and_one_mode() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    x = torch.randn(2, 3, 16, 16)
    assert not torch.equal(model.train()(x), model.eval()(x))
    result = normswap.convert(model)
    assert {name.rpartition(".")[2] for name, _ in result.named_buffers()} <= {"ws_gain", "ws_offset"}
    assert torch.equal(result.train()(x), result.eval()(x))
