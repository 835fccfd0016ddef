"""Networks over time that see nothing of the future: what the plan warns of, and statistics at each position."""

from pathlib import Path
from typing import Any

import badnets
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import Tensor, nn

import normswap
from normswap.cli.app import cli
from normswap.layers.matching import closed_form
from normswap.layers.norms import PositionNorm

CHANNELS = 32


class Causal(nn.Module):
    """Two convolutions over time, padded in front alone, with strides where asked for."""

    def __init__(self, stride: int = 1, ahead: int = 0) -> None:
        super().__init__()
        self.a, self.bn1 = nn.Conv1d(4, CHANNELS, 3, stride), nn.BatchNorm1d(CHANNELS)
        self.b, self.bn2 = nn.Conv1d(CHANNELS, CHANNELS, 3, dilation=2), nn.BatchNorm1d(CHANNELS)
        self.ahead = ahead

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.a(F.pad(x, (2 - self.ahead, self.ahead)))))
        return self.bn2(self.b(F.pad(y, (4 - 2 * self.ahead, 2 * self.ahead))))  # type: ignore[no-any-return]


class Frames(nn.Module):
    """A spectrogram (N, 1, T, F): causal over time, which is the axis before the last, and not over frequencies."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn1 = nn.Conv2d(1, CHANNELS, (3, 3)), nn.BatchNorm2d(CHANNELS)
        self.b, self.bn2 = nn.Conv2d(CHANNELS, CHANNELS, (3, 3)), nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.a(F.pad(x, (1, 1, 2, 0)))))
        return self.bn2(self.b(F.pad(y, (1, 1, 2, 0))))  # type: ignore[no-any-return]


class Points(nn.Module):
    """Every point by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn1 = nn.Conv1d(3, CHANNELS, 1), nn.BatchNorm1d(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.a(x)))


class Pyramid(nn.Module):
    """A stem of strides, whose later padding no output meets at even sizes, and maps put beside each other."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        conv, norm = (nn.Conv1d, nn.BatchNorm1d) if rank == 1 else (nn.Conv2d, nn.BatchNorm2d)
        self.a, self.bn1 = conv(4, CHANNELS, 3, 2, padding=1), norm(CHANNELS)
        self.b, self.bn2 = conv(CHANNELS, CHANNELS, 3, 2, padding=1), norm(CHANNELS)
        self.c, self.bn3 = conv(2 * CHANNELS, CHANNELS, 1), norm(CHANNELS)
        self.d, self.bn4 = conv(CHANNELS, CHANNELS, 3, padding=1), norm(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn2(self.b(F.relu(self.bn1(self.a(x))))))
        return self.bn4(self.d(F.relu(self.bn3(self.c(torch.cat([y, -y], 1))))))  # type: ignore[no-any-return]


class Sized(Pyramid):
    """The same for inputs of 24 positions alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).reshape(len(x), CHANNELS, 6)


def same(rank: int) -> nn.Module:
    conv, norm = (nn.Conv1d, nn.BatchNorm1d) if rank == 1 else (nn.Conv2d, nn.BatchNorm2d)
    return nn.Sequential(conv(4, CHANNELS, 3, padding=1), norm(CHANNELS), conv(CHANNELS, 8, 3, padding=1), norm(8))


X = torch.randn(2, 4, 24)
SPECTROGRAM = torch.randn(2, 1, 20, 10)
NETWORKS: dict[str, tuple[nn.Module, Tensor, int]] = {
    "causal": (Causal(), X, 2),
    "causal with strides": (Causal(stride=2), X, 2),
    "one step ahead": (Causal(ahead=1), X, 0),
    "padded on both sides": (same(1), X, 0),
    "image": (same(2), torch.randn(2, 4, 12, 12), 0),
    "strided stem": (Pyramid(1), X, 0),
    "strided stem of one size": (Sized(1), X, 0),
    "strided stem of an image": (Pyramid(2), torch.randn(2, 4, 16, 16), 0),
    "spectrogram": (Frames(), SPECTROGRAM, 2),
    "points": (Points(), torch.randn(2, 3, 24), 0),
}


@pytest.mark.parametrize(("model", "x", "count"), NETWORKS.values(), ids=NETWORKS)
def test_norms_behind_causal_layers_are_warned_of(model: nn.Module, x: Tensor, count: int) -> None:
    model = badnets.trained(model)
    found = [warning for warning in normswap.inspect(model, example_input=x).warnings if "causal" in warning]
    assert len(found) == bool(count)
    assert all(line.startswith(f"{count} norms stand behind causal layers (bn1, …)") for line in found)
    assert not [w for w in normswap.inspect(model, example_input=x, over="channels").warnings if "causal" in w]


@torch.no_grad()
def looks_ahead(model: nn.Module, x: Tensor, axis: int) -> bool:
    later, half = x.clone(), x.shape[axis] // 2
    later.narrow(axis, half, x.shape[axis] - half).add_(1)
    return not torch.allclose(*(model(value).narrow(axis, 0, half) for value in (x, later)), atol=1e-5)


@pytest.mark.parametrize(("kind", "x", "axis"), [(Causal, X, 2), (Frames, SPECTROGRAM, 2)], ids=["series", "frames"])
def test_statistics_of_each_position_keep_a_network_causal(kind: Any, x: Tensor, axis: int, tmp_path: Path) -> None:
    model = badnets.trained(kind())
    assert not looks_ahead(model, x, axis)
    assert looks_ahead(normswap.convert(model, example_input=x).eval(), x, axis)
    converted = normswap.convert(model, example_input=x, over="channels").eval()
    assert not looks_ahead(converted, x, axis)
    assert [type(module) for name, module in converted.named_modules() if "bn" in name] == [PositionNorm, PositionNorm]
    plan = normswap.plan_of(converted)
    assert all(e.per_position and "of each position" in e.not_equalized for e in plan.norms)
    assert "PositionNorm(2)" in str(plan)
    checks = normswap.check(converted, model)
    assert checks, checks
    assert normswap.Plan.from_dict(plan.to_dict()) == plan
    normswap.save(converted, tmp_path / "OUT", source=None)
    loaded = normswap.load(tmp_path / "OUT", model=kind()).eval()
    assert not looks_ahead(loaded, x, axis)
    torch.testing.assert_close(loaded(x), converted(x))
    torch.testing.assert_close(normswap.fold(converted)(x), converted(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("to", ["torch", "onnx"])
def test_statistics_of_each_position_are_exported(to: str, tmp_path: Path) -> None:
    converted = normswap.convert(badnets.trained(Causal()), example_input=X, over="channels")
    assert normswap.export(converted, tmp_path / "net", to=to).difference <= 1e-5


def test_images_set_the_affine_values_at_each_position() -> None:
    model = badnets.trained(Causal())
    batches = [torch.randn(8, 4, 24) for _ in range(4)]
    plain = normswap.convert(model, example_input=X, over="channels").eval()
    fitted = normswap.convert(model, example_input=X, over="channels", batches=batches).eval()
    with torch.no_grad():
        far, near = (float((net(batches[0]) - model(batches[0])).norm()) for net in (plain, fitted))
    assert near < far


def plain_torch(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """Return group normalization at each position, in other words than the layer's."""
    parts = []
    for part, w, b in zip(x.chunk(groups, 1), weight.chunk(groups), bias.chunk(groups), strict=True):
        mean = part.mean(1, keepdim=True)
        var = (part - mean).pow(2).mean(1, keepdim=True)
        parts.append((part - mean) / (var + eps).sqrt() * w.view(-1, 1) + b.view(-1, 1))
    return torch.cat(parts, 1)


def test_the_layer_is_group_norm_of_every_position() -> None:
    norm, x = PositionNorm(4, 16).double(), torch.randn(3, 16, 7, dtype=torch.float64)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    torch.testing.assert_close(norm(x), plain_torch(x, norm.weight, norm.bias, 4, norm.eps))
    torch.testing.assert_close(norm(x[..., None])[..., 0], norm(x))
    torch.testing.assert_close(norm(x[..., 0]), norm(x)[..., 0])


@pytest.mark.parametrize("groups", [1, 4])
def test_the_closed_form_is_that_of_the_expected_statistics_of_a_position(groups: int) -> None:
    """Of channels that are not correlated; the mean over many positions tells the expectation."""
    generator, channels = torch.Generator().manual_seed(0), 16
    draw = [torch.rand(channels, generator=generator, dtype=torch.float64) for _ in range(4)]
    mean, var, weight, bias = 4 * draw[0] - 2, draw[1] + 0.2, draw[2] + 0.5, draw[3] - 0.5
    noise = torch.randn(4000, channels, 50, generator=generator, dtype=torch.float64)
    x = noise * var.sqrt().view(-1, 1) + mean.view(-1, 1)
    parts = x.unflatten(1, (groups, -1))
    seen = parts.var(2, correction=0).mean((0, 2)).repeat_interleave(channels // groups)
    centre = parts.mean((0, 2, 3)).repeat_interleave(channels // groups)
    gamma, beta = closed_form(
        weight, bias, mean, var, eps=1e-5, norm_eps=0.1, num_groups=groups, per_position=True
    )  # fmt: skip
    scale = weight / (var + 1e-5).sqrt()
    torch.testing.assert_close(gamma, scale * (seen + 0.1).sqrt(), rtol=2e-3, atol=0)
    torch.testing.assert_close(beta, bias + scale * (centre - mean), rtol=0, atol=2e-2)


def test_the_command_line_and_overrides_ask_for_it() -> None:
    options = ["inspect", "badnets:small", "--input", "2,3,16,16"]
    result = CliRunner().invoke(cli, [*options, "--over", "channels"])
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("PositionNorm(") == 2
    one = CliRunner().invoke(cli, [*options, "--override", "1:over=channels"])
    assert one.stdout.count("PositionNorm(") == 1
    with pytest.raises(normswap.InvalidOption, match="over='time' is not one of 'sample', 'channels'"):
        normswap.inspect(Causal(), example_input=X, over="time")
