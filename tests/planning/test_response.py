import pytest
import torch
from torch import nn

import normswap
from normswap.networks.network import Network
from normswap.planning.response import CONSTANTS, responses
from normswap.tracing.forward import trace


def norm(channels: int, kind: type[nn.Module] = nn.BatchNorm2d) -> nn.Module:
    made = kind(channels)
    with torch.no_grad():
        for values, low in ((made.running_var, 0.3), (made.running_mean, -1), (made.weight, 0.2), (made.bias, -1)):
            values.uniform_(low, 2)  # type: ignore[operator]
    return made


def conv(*size: int, **more: object) -> nn.Conv2d:
    return nn.Conv2d(*size, 3, padding=1, padding_mode="circular", **more)  # type: ignore[arg-type]


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 8), conv(3, 8), conv(16, 8)
        self.first, self.second, self.last = norm(8), norm(8), norm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.first(self.a(x)), self.second(self.b(x))
        return self.last(self.c(torch.cat([a + b, nn.functional.avg_pool2d(b, 1)], 1)))


LINEAR = {
    "plain": lambda: nn.Sequential(conv(3, 8), norm(8), conv(8, 4), norm(4)),
    "grouped and depthwise": lambda: nn.Sequential(
        conv(3, 8), norm(8), conv(8, 12, groups=4), norm(12), conv(12, 12, groups=12), norm(12)
    ),
    "branches": Branches,
    "sequence": lambda: nn.Sequential(conv(3, 8), norm(8), nn.AvgPool2d(2), nn.Dropout(), conv(8, 8), norm(8)),
    "linear": lambda: nn.Sequential(
        conv(3, 8), norm(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6), norm(6, nn.BatchNorm1d)
    ),
    "transposed": lambda: nn.Sequential(conv(3, 8), norm(8), nn.ConvTranspose2d(8, 6, 1, groups=2), norm(6)),
}


@pytest.mark.parametrize("build", LINEAR.values(), ids=LINEAR)
def test_a_network_without_activations_answers_to_constants_as_told(
    build: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("normswap.planning.response.OWN", 0)
    torch.manual_seed(0)
    model = build().eval()
    constants = torch.randn(CONSTANTS, 3, generator=torch.Generator().manual_seed(0))
    norms = {name: m for name, m in model.named_modules() if hasattr(m, "running_var")}
    seen: dict[str, torch.Tensor] = {}
    for name, module in norms.items():
        module.register_forward_pre_hook(lambda m, args, name=name: seen.update({name: args[0]}))
    x = torch.randn(1, 3, 8, 8).expand(CONSTANTS, -1, -1, -1)
    with torch.no_grad():
        model(x)
        before = dict(seen)
        model(x + constants[..., None, None])
    network = Network(model)
    told = responses(network, trace(network, torch.randn(2, 3, 8, 8)).graphs[0], {})
    assert told.keys() == norms.keys()
    for name, module in norms.items():
        moved = (seen[name] - before[name]).flatten(2).mean(2) if seen[name].ndim > 2 else seen[name] - before[name]
        moved = moved / (module.running_var + module.eps).sqrt()
        (first,) = told[name].first
        torch.testing.assert_close(first / first.norm(), moved / moved.norm(), atol=1e-4, rtol=1e-3)


def test_a_network_without_activations_answers_to_errors_as_told() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        conv(3, 8), norm(8), conv(8, 8), norm(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )
    model.eval()
    shift = torch.zeros(8, requires_grad=True)

    def shifted(shift: torch.Tensor) -> torch.Tensor:
        return model[1:](model[0](torch.ones(1, 3, 8, 8)) + shift.view(1, 8, 1, 1))[0]

    jacobian = torch.autograd.functional.jacobian(shifted, shift)
    network = Network(model)
    told = responses(network, trace(network, torch.randn(2, 3, 8, 8)).graphs[0], {})["1"].slopes
    assert told is not None
    assert told.shape == (CONSTANTS, 8)
    signs = told @ torch.linalg.pinv(jacobian)
    torch.testing.assert_close(signs, signs.sign(), atol=1e-3, rtol=0)
    torch.testing.assert_close(signs @ jacobian, told, atol=1e-4, rtol=1e-3)


class Together(nn.BatchNorm2d):
    """A norm with its activation, as timm's are."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(super().forward(x))


@pytest.mark.parametrize("inside", [False, True], ids=["beside", "inside"])
def test_behind_a_rectifier_means_move_with_contrast(monkeypatch: pytest.MonkeyPatch, *, inside: bool) -> None:
    monkeypatch.setattr("normswap.planning.response.OWN", 0)
    torch.manual_seed(0)
    first = norm(8, Together if inside else nn.BatchNorm2d)
    model = nn.Sequential(conv(1, 8), first, *([] if inside else [nn.ReLU()]), conv(8, 8), norm(8)).eval()
    network, last = Network(model), len(model) - 1
    graph = trace(network, torch.randn(2, 1, 8, 8)).graphs[0]
    told = responses(network, graph, {"1": ("act",)} if inside else {})[str(last)].first[0]

    z = torch.randn(100_000, 1) * first.weight.abs() + first.bias  # what the norm makes of normal channels
    slope = (z > 0).float().mean(0)
    by_constant = model[0].weight.sum((1, 2, 3)) / (first.running_var + first.eps).sqrt() * first.weight * slope
    by_contrast = ((1.05 * (z - first.bias) + first.bias).relu() - z.relu()).mean(0) / 0.05
    ways = torch.stack([by_constant, by_contrast]) @ model[last - 1].weight.sum((2, 3)).T
    ways = (ways / (model[last].running_var + model[last].eps).sqrt()).detach()
    assert torch.linalg.matrix_rank(told, rtol=1e-4) == 2
    left = told.T - ways.T @ torch.linalg.lstsq(ways.T, told.T).solution
    assert float(left.norm() / told.norm()) < 0.03


@pytest.mark.parametrize("groups", [1, 4])
def test_scales_told_by_filters_keep_more_where_samples_differ_by_constants(groups: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 32), norm(32), nn.ReLU(), conv(32, 32), norm(32), nn.ReLU(), conv(32, 32), norm(32))
    for _ in range(50):  # the statistics become those of what is fed
        model.train()(torch.randn(32, 3, 8, 8) + torch.randn(32, 3, 1, 1))
    model.eval()
    x = torch.randn(64, 3, 8, 8) + torch.randn(64, 3, 1, 1)
    with torch.no_grad():
        off = {
            equalize: float((normswap.convert(model, groups=groups, shrink=1, equalize=equalize)(x) - model(x)).norm())
            for equalize in (True, False)
        }
    assert off[True] < 0.7 * off[False], off


def test_what_cannot_be_followed_is_left_to_chance() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 8), norm(8), nn.PixelShuffle(2), conv(2, 8), norm(8)).eval()
    network = Network(model)
    told = responses(network, trace(network, torch.randn(2, 3, 8, 8)).graphs[0], {})
    sums = model[3].weight.detach().sum((2, 3)) / (model[4].running_var + model[4].eps).sqrt()[:, None]
    (first,) = told["4"].first
    assert torch.linalg.matrix_rank(first) == 2  # two channels behind the shuffle, each with moves of its own
    projected = sums @ torch.linalg.pinv(sums) @ first.T
    torch.testing.assert_close(projected, first.T, atol=1e-4, rtol=1e-3)


class Mixed(nn.Conv2d):
    """Filters that are mixed from experts, one mixture per sample, as Yang et al. 2019 (arXiv 1904.04971) do."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__(channels, channels, 3, padding=1, groups=groups, bias=False)
        self.weight = nn.Parameter(torch.randn(4, self.weight.numel()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        share = x.mean((2, 3))[:, :4].softmax(1)
        kernels = (share @ self.weight).view(-1, self.in_channels // self.groups, 3, 3)
        rows = x.reshape(1, -1, *x.shape[2:])
        return nn.functional.conv2d(rows, kernels, padding=1, groups=self.groups * len(x)).view_as(x)


@pytest.mark.parametrize("groups", [1, 8], ids=["dense", "depthwise"])
def test_filters_of_another_shape_tell_nothing(groups: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 8), norm(8), Mixed(8, groups), norm(8), conv(8, 8), norm(8)).eval()
    plan = normswap.inspect(model, example_input=torch.randn(2, 3, 8, 8))
    assert [entry.action.value for entry in plan.norms] == ["group_norm"] * 3
    assert set(plan.scales) == {"0", "4"}


@pytest.mark.parametrize("size", [1e15, 1e30, float("inf")], ids=str)
def test_moves_that_grow_without_end_are_left_to_chance(size: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 8), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), norm(8), conv(8, 8), norm(8)).eval()
    with torch.no_grad():
        model[1].weight.mul_(size)
    network = Network(model)
    told = responses(network, trace(network, torch.randn(2, 3, 8, 8)).graphs[0], {})
    assert told.keys() == {"3", "5"}
    for seen in told.values():
        (first,) = seen.first
        torch.testing.assert_close(first.square().mean(), torch.tensor(0.1))


def test_channels_move_by_themselves_the_more_the_fewer_an_input_has() -> None:
    def largest(channels: int) -> float:
        """Return the share of the second norm's moves that go one way, where the first layer's filters are alike."""
        torch.manual_seed(0)
        model = nn.Sequential(conv(channels, 16), norm(16), conv(16, 16), norm(16)).eval()
        model[0].weight.data[:] = 1
        told = responses(Network(model), trace(Network(model), torch.randn(2, channels, 8, 8)).graphs[0], {})
        values = torch.linalg.svdvals(told["3"].first[0]).square()
        return float(values[0] / values.sum())

    assert largest(1) < 0.5 < 0.6 < largest(3) == pytest.approx(largest(4), abs=0.15)
