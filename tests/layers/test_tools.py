"""Tools that change convolutions, on weight-standardized ones; what they do is what they do to a plain convolution."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, weight_norm
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations

from normswap.layers.convs import WeightStandardized, plain_conv, ws_class

KINDS = pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d, Conv2dSame])
X = torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(0))


class Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def both(kind: type[nn.Module]) -> tuple[nn.Module, WeightStandardized]:
    """A plain convolution, and the adaptive form of an equal one."""
    torch.manual_seed(0)
    conv = kind(4, 6, 3)
    return conv, ws_class(kind).of(copy.deepcopy(conv), adaptive=True)


TOOLS: dict[str, Callable[[nn.Module], object]] = {
    "prune": lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
    "prune twice": lambda conv: [prune.l1_unstructured(conv, "weight", 0.3) for _ in range(2)],
    "parametrize": lambda conv: register_parametrization(conv, "weight", Double()),
    "parametrized bias": lambda conv: register_parametrization(conv, "bias", Double()),
    "weight_norm": lambda conv: parametrizations.weight_norm(conv),
    "orthogonal": lambda conv: parametrizations.orthogonal(conv, use_trivialization=False),
}


@KINDS
@pytest.mark.parametrize("tool", TOOLS.values(), ids=TOOLS)
def test_a_tool_does_to_the_kernel_what_it_does_to_a_plain_one(
    kind: type[nn.Module], tool: Callable[[nn.Module], object]
) -> None:
    conv, ws = both(kind)
    for layer in (conv, ws):
        torch.manual_seed(1)
        tool(layer)
    torch.testing.assert_close(ws(X), conv(X), rtol=1e-4, atol=1e-4)
    ws(X).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ws.parameters())
    folded = plain_conv(ws)
    assert type(folded) is kind
    assert set(folded.state_dict()) == {"weight", "bias"}
    torch.testing.assert_close(folded(X), ws(X), rtol=1e-4, atol=1e-4)


@KINDS
def test_pruned_weights_stay_zero_in_the_kernel(kind: type[nn.Module]) -> None:
    _, ws = both(kind)
    prune.l1_unstructured(ws, "weight", 0.5)
    with torch.no_grad():
        ws.weight_orig.add_(torch.randn_like(ws.weight_orig))  # type: ignore[operator, union-attr, arg-type]
    ws(X)
    assert (ws.standardized_weight() == 0).float().mean() == 0.5
    assert (plain_conv(ws).weight == 0).float().mean() == 0.5  # type: ignore[union-attr, operator]


@KINDS
@pytest.mark.parametrize("trained", [False, True], ids=["untouched", "trained"])
def test_a_mask_made_permanent_leaves_the_kernel_as_it_is(kind: type[nn.Module], trained: bool) -> None:
    _, ws = both(kind)
    if trained:
        with torch.no_grad():
            ws.weight.add_(0.1 * torch.randn_like(ws.weight))
    prune.l1_unstructured(ws, "weight", 0.5)
    expected = ws(X)
    prune.remove(ws, "weight")
    assert set(ws.state_dict()) == {"weight", "bias", "ws_gain", "ws_offset"}
    torch.testing.assert_close(ws(X), expected, rtol=1e-5, atol=1e-5)
    assert (ws.weight == 0).float().mean() == 0.5
    ws(X).square().mean().backward()
    assert ws.weight.grad is not None


@KINDS
@pytest.mark.parametrize("trains", [True, False])
def test_writing_past_autograd_reaches_the_kernel_of_a_frozen_layer_alone(kind: type[nn.Module], trains: bool) -> None:
    _, ws = both(kind)
    with torch.no_grad():
        ws.weight.mul_(3)
    kernel, change = ws.standardized_weight().detach(), torch.randn(ws.weight.shape)
    ws.weight.requires_grad_(trains)
    ws.weight.data += change
    if trains:  # an optimizer that steps through .data: the filters move, the kernel stays standardized
        fresh = ws_class(kind).of(kind(4, 6, 3), adaptive=True)
        fresh.load_state_dict(ws.state_dict())
        torch.testing.assert_close(ws.standardized_weight(), fresh.standardized_weight(), rtol=0, atol=0)
    else:
        torch.testing.assert_close(ws.standardized_weight(), kernel + change, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ws.weight, kernel + change, rtol=1e-5, atol=1e-5)


@KINDS
def test_averages_of_frozen_filters_are_standardized_as_filters(kind: type[nn.Module]) -> None:
    _, ws = both(kind)
    average = copy.deepcopy(ws).requires_grad_(False)
    with torch.no_grad():
        for _ in range(3):
            assert average.weight.shape == ws.weight.shape  # a tool that asks for it
            ws.weight.mul_(2).add_(torch.randn_like(ws.weight))
            for mine, theirs in zip(average.parameters(), ws.parameters(), strict=True):
                mine.lerp_(theirs, 0.5)
            average(X)
    filters = average.weight.clone()
    fresh = ws_class(kind).of(kind(4, 6, 3), adaptive=True)
    fresh.load_state_dict({**ws.state_dict(), "weight": filters})
    torch.testing.assert_close(average.standardized_weight(), fresh.standardized_weight(), rtol=0, atol=0)


def its_size(ws: nn.Module) -> Any:
    return sum(module.weight.numel() for module in ws.modules() if hasattr(module, "weight"))  # type: ignore[misc, operator]


def its_type(ws: Any) -> Any:
    return X.to(ws.weight.dtype), X.to(ws.weight.device), ws.weight is not None, ws.weight.shape


@KINDS
@pytest.mark.parametrize("ask", [its_size, its_type])
def test_averages_through_data_are_filters_though_a_tool_asked_for_sizes(
    kind: type[nn.Module], ask: Callable[[Any], Any]
) -> None:
    _, ws = both(kind)
    average = copy.deepcopy(ws).requires_grad_(False)
    with torch.no_grad():
        ws.weight.mul_(2).add_(torch.randn_like(ws.weight))
    for mine, theirs in zip(average.parameters(), ws.parameters(), strict=True):
        ask(average)
        mine.data = 0.5 * mine.data + 0.5 * theirs.data
    fresh = ws_class(kind).of(kind(4, 6, 3), adaptive=True)
    fresh.load_state_dict({**ws.state_dict(), "weight": average._parameters["weight"]})
    torch.testing.assert_close(average.standardized_weight(), fresh.standardized_weight(), rtol=0, atol=0)


def copied(mine: Any, theirs: Any) -> None:
    mine.weight.data.copy_(theirs.weight.data)


def averaged(mine: Any, theirs: Any) -> None:
    mine.weight.data.mul_(0.5).add_(theirs.weight.data, alpha=0.5)


def drawn_to(mine: Any, theirs: Any) -> None:
    mine.weight.data.lerp_(theirs.weight.data, 0.5)


@KINDS
@pytest.mark.parametrize("update", [copied, averaged, drawn_to])
def test_another_layers_filters_are_filters_though_they_come_through_data(
    kind: type[nn.Module], update: Callable[[Any, Any], None]
) -> None:
    """A frozen teacher that was updated layer by layer counted as one into which something is merged."""
    _, ws = both(kind)
    teacher = copy.deepcopy(ws).requires_grad_(False)
    with torch.no_grad():
        ws.weight.mul_(2).add_(torch.randn_like(ws.weight))
    filters = ws.weight.detach() if update is copied else (teacher._parameters["weight"] + ws.weight.detach()) / 2
    fresh = ws_class(kind).of(kind(4, 6, 3), adaptive=True)
    fresh.load_state_dict({**ws.state_dict(), "weight": filters})
    update(teacher, ws)
    torch.testing.assert_close(teacher.standardized_weight(), fresh.standardized_weight())


@KINDS
def test_a_copy_of_what_was_there_before_takes_a_merge_back(kind: type[nn.Module]) -> None:
    _, ws = both(kind)
    ws.requires_grad_(False)
    kernel, before = ws.standardized_weight(), ws.weight.data.clone()
    ws.weight.data += torch.randn_like(before)
    ws(X)
    ws.weight.data.copy_(before)
    torch.testing.assert_close(ws.standardized_weight(), kernel, rtol=1e-5, atol=1e-5)


@KINDS
def test_spectral_norm_bounds_the_kernel(kind: type[nn.Module]) -> None:
    _, ws = both(kind)
    axis = 1 if kind is nn.ConvTranspose2d else 0
    parametrizations.spectral_norm(ws, n_power_iterations=50)
    kernel = ws.standardized_weight().detach().transpose(0, axis).flatten(1)
    assert abs(float(torch.linalg.matrix_norm(kernel, 2)) - 1) < 1e-3


@KINDS
def test_old_weight_norm_and_taking_tools_off(kind: type[nn.Module]) -> None:
    conv, ws = both(kind)
    expected = ws(X)
    with pytest.warns(FutureWarning, match="weight_norm"):
        weight_norm(ws)
    torch.testing.assert_close(ws(X), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(plain_conv(ws)(X), conv(X), rtol=1e-4, atol=1e-4)
    torch.nn.utils.remove_weight_norm(ws)
    register_parametrization(ws, "weight", nn.Identity())
    remove_parametrizations(ws, "weight")
    torch.testing.assert_close(ws(X), expected, rtol=1e-4, atol=1e-4)


@KINDS
def test_called_as_torchs_class_it_makes_torchs_class(kind: type[nn.Module]) -> None:
    _, ws = both(kind)
    made = type(ws)(4, 2, 1, bias=False)
    assert type(made) is kind
    assert made(X).shape[:2] == (2, 2)


@KINDS
def test_a_class_that_a_tool_makes_of_it_has_a_constructor_of_its_own(kind: type[nn.Module]) -> None:
    class Patched(nn.Module):  # as `higher` makes one of every layer
        def __init__(self, names: list[str], root: Any = None) -> None:
            nn.Module.__init__(self)
            self.names, self.root = names, [root]

    _, ws = both(kind)
    made = type("Patched", (Patched, type(ws)), {})(["weight"], root=ws)
    assert isinstance(made, type(ws))
    assert made.names == ["weight"]
    assert made.root == [ws]


@KINDS
def test_a_compiled_layer_forgets_that_and_compiles_again(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    conv = kind(4, 6, 3)
    conv.compile(backend="eager")
    ws = ws_class(kind).of(conv, adaptive=True)
    with torch.no_grad():
        ws.weight.add_(torch.randn_like(ws.weight))
    torch.testing.assert_close(ws(X), ws.forward(X))
    ws.compile(backend="eager")
    torch.testing.assert_close(ws(X), ws.forward(X))
    torch.testing.assert_close(plain_conv(ws)(X), ws.forward(X), rtol=1e-4, atol=1e-4)


class Noting(nn.Conv2d):
    """Notes what it sees, and reads its weight past the attribute."""

    seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return self._conv_forward(x, self._parameters["weight"], self.bias)  # type: ignore[arg-type]


def test_a_class_may_note_things_and_read_its_weight_among_its_parameters() -> None:
    _, ws = both(Noting)
    with torch.no_grad():
        ws.weight.add_(1 + torch.randn_like(ws.weight))
    expected = torch.conv2d(X, ws.standardized_weight(), ws.bias)
    torch.testing.assert_close(ws(X), expected)
    ws(X)
    assert ws.seen == 2
