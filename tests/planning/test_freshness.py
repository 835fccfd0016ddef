"""Only what is shown to be fresh is overwritten; what starts at zero can grow."""

import copy
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

import normswap
from normswap.demo.digits import digits_resnet
from normswap.planning.freshness import first_not_initialized

X = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def trained_filters(conv: nn.Module) -> None:
    """Give filters scales and means that differ, as training does."""
    weight = conv.weight.data  # type: ignore[union-attr]
    weight *= torch.logspace(-1, 1, len(weight)).view(-1, 1, 1, 1)
    weight += weight.std((1, 2, 3), keepdim=True) * torch.randn(len(weight), 1, 1, 1)


NORMS: dict[str, Callable[[], nn.Module]] = {
    "nothing": lambda: nn.BatchNorm2d(16, affine=False, track_running_stats=False),
    "frozen identity": lambda: FrozenBatchNorm2d(16),
    "frozen affine part": lambda: nn.BatchNorm2d(16, track_running_stats=False).requires_grad_(False),
    "fresh": lambda: nn.BatchNorm2d(16),
    "fresh, no statistics": lambda: nn.BatchNorm2d(16, track_running_stats=False),
    "fresh, no affine part": lambda: nn.BatchNorm2d(16, affine=False),
}


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_trained_filters_are_never_overwritten(norm: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), norm())
    trained_filters(net[0])
    net.eval()
    expected = net[0](X)
    new = normswap.convert(net, example_input=X)
    assert normswap.plan_of(new).convs[0].ws == "adaptive"
    torch.testing.assert_close(new[0](X), expected, rtol=1e-4, atol=1e-4)


REASONS = {
    "nothing": "its norm does not show whether it is trained",
    "frozen identity": "its norm does not show whether it is trained",
    "frozen affine part": "its norm does not show whether it is trained",
    "fresh": "its norm is fresh",
    "fresh, no statistics": "its norm is fresh",
    "fresh, no affine part": "its norm is fresh",
}


@pytest.mark.parametrize(("name", "reason"), REASONS.items(), ids=REASONS)
def test_a_norm_that_shows_nothing_is_taken_for_trained(name: str, reason: str) -> None:
    torch.manual_seed(0)
    entry = normswap.inspect(nn.Sequential(nn.Conv2d(3, 16, 3), NORMS[name]()), example_input=X).convs[0]
    assert (entry.reason, entry.ws) == (reason, "standard" if reason == "its norm is fresh" else "adaptive")


def test_a_network_of_which_a_part_is_trained_is_trained() -> None:
    net = digits_resnet()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
    plan = normswap.inspect(net, example_input=torch.zeros(2, 1, 8, 8))
    assert {entry.ws for entry in plan.convs} == {"adaptive"}
    assert "its norm is fresh, the filters of layer1.0.conv2 are not" in {entry.reason for entry in plan.convs}


def test_a_fresh_norm_beside_a_trained_one() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    nn.init.normal_(net[1].running_mean)
    assert [entry.reason for entry in normswap.inspect(net, example_input=X).convs] == [
        "its norm is trained", "its norm is fresh, 1 is trained"
    ]  # fmt: skip


INITIALIZERS: dict[str, Callable[[Tensor], object]] = {
    "torch's": lambda weight: weight,
    "kaiming": lambda weight: nn.init.kaiming_normal_(weight, mode="fan_out"),
    "xavier": nn.init.xavier_uniform_,
    "truncated": lambda weight: nn.init.trunc_normal_(weight, std=0.02),
    "orthogonal": nn.init.orthogonal_,
    "zeros": nn.init.zeros_,
}


@pytest.mark.parametrize("initialize", INITIALIZERS.values(), ids=INITIALIZERS)
@pytest.mark.parametrize(
    "shape", [(3, 16, 3, 1), (64, 64, 3, 1), (32, 32, 3, 32), (256, 256, 5, 256), (128, 32, 1, 1), (3, 1, 3, 1)]
)
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_filters_as_initializers_make_them(
    kind: type[nn.Module], shape: tuple[int, ...], initialize: Callable[[Tensor], object]
) -> None:
    inputs, outputs, side, groups = shape
    for seed in range(5):
        torch.manual_seed(seed)
        conv = kind(inputs, outputs, side, groups=groups)
        initialize(conv.weight)  # type: ignore[arg-type]
        assert first_not_initialized({"": conv}) is None


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d])
def test_neighbours_in_a_kernel_that_resemble_each_other_were_trained(kind: type[nn.Module]) -> None:
    for alike in (0.0, 0.7):
        torch.manual_seed(0)
        conv = kind(16, 64, 3)
        weight = conv.weight.data  # type: ignore[union-attr]
        weight.normal_()
        weight += alike * torch.randn_like(weight[..., :1])  # one number for the positions of a row
        assert first_not_initialized({"conv": conv}) == ("conv" if alike else None)


def test_filters_after_some_steps() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32))
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    x, wanted = torch.rand(64, 1, 8, 8).cumsum(3) / 8, torch.randn(64, 32)
    assert {entry.ws for entry in normswap.inspect(net, example_input=x).convs} == {"standard"}
    for _ in range(150):
        optimizer.zero_grad()
        F.mse_loss(net(x).relu().mean((2, 3)), wanted).backward()
        optimizer.step()
    for norm in (net[1], net[4]):
        norm.reset_parameters()  # type: ignore[operator]
    assert {entry.ws for entry in normswap.inspect(net, example_input=x).convs} == {"adaptive"}


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_byobnet"])
def test_fresh_networks_get_the_standard_form(name: str) -> None:
    plan = normswap.inspect(timm.create_model(name))
    assert {entry.ws for entry in plan.convs if entry.changes} == {"standard"}


class Branches(nn.Module):
    """A branch that starts at zero, or close to it, added to another."""

    def __init__(self, start: float, trained: bool) -> None:
        super().__init__()
        self.a, self.zero = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16, momentum=None)
        nn.init.normal_(self.zero.weight, 0, start)
        if trained:
            self(X)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.a(x) + self.zero(x))


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "fresh"])
@pytest.mark.parametrize("start", [0.0, 1e-5])
def test_a_branch_that_starts_at_zero_learns(start: float, trained: bool) -> None:
    torch.manual_seed(0)
    net = Branches(start, trained).eval()
    new = normswap.convert(net, example_input=X)
    entries = {entry.name: entry for entry in normswap.plan_of(new).convs}
    assert entries["zero"].reason == "its filters are zero or constant: standardized they could not grow"
    assert entries["a"].changes
    goal = copy.deepcopy(new)
    nn.init.normal_(goal.zero.weight, 0, 0.3)
    want, optimizer = goal(X).detach(), torch.optim.Adam([new.zero.weight], 1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (new(X) - want).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < 0.3 * losses[0]
    assert new.zero.weight.std() > 0.05


def test_half_of_the_filters_at_zero_in_a_sum() -> None:
    torch.manual_seed(0)
    net = Branches(0.1, trained=True).eval()
    net.zero.weight.data[8:] = 0
    assert not next(e for e in normswap.inspect(net, example_input=X).convs if e.name == "zero").changes
    net.zero.weight.data[8:14] = 0.1 * torch.randn(6, 3, 3, 3)
    assert next(e for e in normswap.inspect(net, example_input=X).convs if e.name == "zero").changes


def test_small_filters_whose_norm_does_not_mind_are_standardized() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16))
    net[0].weight.data.mul_(1e-6)
    assert normswap.inspect(net, example_input=X).convs[0].changes


def test_layers_that_are_looked_at_together_show_what_each_shows_alone() -> None:
    torch.manual_seed(0)
    layers: dict[str, nn.Module] = {f"{width}": nn.Conv2d(width, 8, 3) for width in (1, 3, 3, 70, 70)}
    layers |= {"halved": nn.Conv2d(3, 8, 3), "meta": nn.Conv2d(3, 8, 3, device="meta"), "last": nn.Conv2d(3, 8, 3)}
    for name in ("last", "halved"):
        with torch.no_grad():
            layers[name].weight[:4] *= 100  # type: ignore[union-attr, operator, index]
    assert [name for name, layer in layers.items() if first_not_initialized({"": layer}) is not None] == [
        "halved",
        "last",
    ]
    assert first_not_initialized(layers) == "halved"
    assert first_not_initialized({}) is None
