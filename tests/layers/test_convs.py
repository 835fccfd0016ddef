"""The weight-standardized convolutions."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from equality import assert_same_output, assert_same_state
from timm.layers import Conv2dSame
from torch import Tensor, nn

from normswap.layers.convs import WeightStandardized, conv_class, plain_conv, ws_class
from normswap.layers.standardization import EPS

CONVS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 9)),
    "2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2), (2, 4, 9, 9)),
    "2d grouped": (lambda: nn.Conv2d(4, 8, 3, groups=2, bias=False), (2, 4, 9, 9)),
    "2d reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 9, 9)),
    "3d": (lambda: nn.Conv3d(4, 6, 3), (2, 4, 5, 5, 5)),
    "same": (lambda: Conv2dSame(4, 6, 3, stride=2), (2, 4, 9, 9)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3), (2, 4, 9)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2, output_padding=1), (2, 4, 9, 9)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(4, 6, 3), (2, 4, 5, 5, 5)),
}


ALL = pytest.mark.parametrize(("build", "shape"), CONVS.values(), ids=CONVS)


def make(build: Callable[[], nn.Module], *, adaptive: bool) -> tuple[nn.Module, WeightStandardized]:
    torch.manual_seed(0)
    conv = build()
    return conv, ws_class(type(conv)).of(conv, adaptive=adaptive)


def reference(conv: nn.Module) -> Tensor:
    """The standardized kernel in float64, written out filter by filter."""
    weight = conv.weight.detach().double()  # type: ignore[union-attr, operator]
    result = torch.empty_like(weight)
    groups, transposed = int(conv.groups), bool(conv.transposed)  # type: ignore[arg-type]
    for g in range(groups):
        for c in range(conv.out_channels // groups):  # type: ignore[operator]
            if transposed:
                rows = slice(g * weight.shape[0] // groups, (g + 1) * weight.shape[0] // groups)
                index: tuple[slice | int, ...] = (rows, c)
            else:
                index = (g * conv.out_channels // groups + c,)  # type: ignore[operator]
            one = weight[index]
            result[index] = (one - one.mean()) / (one.var(correction=0) + EPS).sqrt()
    return result


@ALL
def test_standard_kernel(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    conv, ws = make(build, adaptive=False)
    torch.testing.assert_close(ws.standardized_weight().double(), reference(conv), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        expected = copy.deepcopy(conv)
        expected.weight.copy_(reference(conv))  # type: ignore[union-attr, operator]
    torch.testing.assert_close(ws(torch.ones(shape)), expected(torch.ones(shape)), rtol=1e-4, atol=1e-4)


@ALL
def test_adaptive_keeps_the_kernel(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    conv, ws = make(build, adaptive=True)
    weight = conv.weight
    assert (ws.standardized_weight() - weight).abs().max() <= 1e-6 * weight.abs().max()  # type: ignore[operator, union-attr]
    x = torch.randn(shape)
    torch.testing.assert_close(ws(x), conv(x), rtol=1e-4, atol=1e-5)


@ALL
@pytest.mark.parametrize("adaptive", [False, True], ids=["standard", "adaptive"])
def test_survives_copies_and_pickles(build: Callable[[], nn.Module], shape: tuple[int, ...], adaptive: bool) -> None:
    _, ws = make(build, adaptive=adaptive)
    x = torch.randn(shape)
    for twin in (copy.deepcopy(ws), pickle.loads(pickle.dumps(ws))):
        assert type(twin) is type(ws)
        assert_same_state(twin, ws)
        assert_same_output(twin(x), ws(x))


@ALL
def test_same_keys_same_parameters(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    conv, ws = make(build, adaptive=False)
    assert ws.state_dict().keys() == conv.state_dict().keys()
    assert all(ours is theirs for ours, theirs in zip(ws.parameters(), conv.parameters(), strict=True))
    assert isinstance(ws, type(conv))
    assert ws.weight is conv.weight
    assert list(ws.buffers()) == []


@ALL
def test_gradients_match_finite_differences(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    _, ws = make(build, adaptive=False)
    ws.double()
    weight = ws._parameters["weight"]
    assert weight is not None

    def kernel_of(values: Tensor) -> Tensor:
        return torch.func.functional_call(_Kernel(ws), {"conv.weight": values}, ())

    assert torch.autograd.gradcheck(kernel_of, (weight.detach().clone().requires_grad_(),), atol=1e-4)


class _Kernel(nn.Module):
    def __init__(self, conv: WeightStandardized) -> None:
        super().__init__()
        self.conv = conv

    def forward(self) -> Tensor:
        return self.conv.standardized_weight()


@ALL
def test_folds_into_the_class_it_came_from(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    conv, ws = make(build, adaptive=False)
    folded = plain_conv(ws)
    x = torch.randn(shape)
    assert type(folded) is type(conv)
    assert_same_output(folded(x), ws(x))
    assert folded.state_dict().keys() == conv.state_dict().keys()
    assert pickle.loads(pickle.dumps(folded)).weight.equal(folded.weight)


def test_initializers_write_the_raw_parameter() -> None:
    _, ws = make(lambda: Conv2dSame(4, 6, 3), adaptive=True)
    nn.init.constant_(ws.weight, 3.0)
    assert ws.state_dict()["weight"].eq(3).all()


@pytest.mark.parametrize("adaptive", [False, True], ids=["standard", "adaptive"])
def test_constant_filters_have_finite_gradients(adaptive: bool) -> None:
    conv = nn.Conv2d(3, 4, 3)
    nn.init.constant_(conv.weight, 0.5)
    ws = ws_class(nn.Conv2d).of(conv, adaptive=adaptive)
    ws(torch.randn(1, 3, 5, 5)).sum().backward()
    assert torch.isfinite(conv.weight.grad).all()  # type: ignore[arg-type]


@pytest.mark.parametrize("build", [lambda: nn.Conv2d(4, 6, 3), lambda: Conv2dSame(4, 6, 3)], ids=["plain", "same"])
def test_exports_and_compiles(build: Callable[[], nn.Module]) -> None:
    _, ws = make(build, adaptive=True)
    ws.eval()
    x = torch.randn(2, 4, 9, 9)
    exported = torch.export.export(ws, (x,)).module()
    torch.testing.assert_close(exported(x), ws(x))
    compiled = torch.compile(ws, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), ws(x))


@pytest.mark.parametrize(("adaptive", "form"), [(False, "standard"), (True, "adaptive")])
def test_a_layer_tells_its_form(adaptive: bool, form: str) -> None:
    conv, ws = make(lambda: nn.Conv2d(4, 6, 3), adaptive=adaptive)
    assert (ws.form, ws.ws_eps, repr(ws)) == (
        form,
        EPS,
        f"WSConv2d(4, 6, kernel_size=(3, 3), stride=(1, 1), ws={form})",
    )
    assert {name for name, _ in ws.named_parameters()} == {"weight", "bias"}
    assert {name for name, _ in ws.named_buffers()} == ({"ws_gain", "ws_offset"} if adaptive else set())
    assert set(vars(conv)) == set(vars(nn.Conv2d(4, 6, 3)))
    assert set(conv._parameters) == {"weight", "bias"}


def test_classes_are_made_once_and_remember_theirs() -> None:
    assert ws_class(Conv2dSame) is ws_class(Conv2dSame)
    assert ws_class(Conv2dSame).__name__ == "WSConv2dSame"
    assert ws_class(Conv2dSame).__module__ == "normswap.layers.convs"
    for plain in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, Conv2dSame):
        made = ws_class(plain)
        assert made.__name__ == f"WS{plain.__name__}"
        assert conv_class(made) is plain


@pytest.mark.parametrize("kind", [Conv2dSame, nn.ConvTranspose2d])
def test_weight_is_raw_again_after_a_forward_that_fails(kind: type[nn.Module]) -> None:
    _, ws = make(lambda: kind(4, 6, 3), adaptive=False)
    seen = []
    ws.register_forward_pre_hook(lambda module, _: seen.append(module.weight))
    raw = ws._parameters["weight"]
    with pytest.raises(RuntimeError):
        ws(torch.randn(2, 5, 9, 9))
    ws(torch.randn(2, 4, 9, 9))
    assert all(weight is raw for weight in (*seen, ws.weight))
    del ws._parameters["weight"]
    with pytest.raises(AttributeError, match="weight"):
        _ = ws.weight


@ALL
@pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "frozen"])
def test_folded_layers_share_nothing_that_was_standardized(
    build: Callable[[], nn.Module], shape: tuple[int, ...], trainable: bool
) -> None:
    conv, ws = make(build, adaptive=True)
    ws.weight.requires_grad_(trainable)
    ws(torch.randn(shape))
    folded = plain_conv(ws)
    assert set(vars(folded)) == set(vars(conv))
    assert list(folded._parameters) == list(conv._parameters)
    assert folded.weight.requires_grad is trainable
    assert folded.weight is not ws.weight
    assert folded.weight.is_leaf
    assert {"ws_gain", "ws_offset"} <= set(ws._buffers)


@pytest.mark.parametrize("adaptive", [False, True], ids=["standard", "adaptive"])
def test_a_layer_uses_its_own_epsilon(adaptive: bool) -> None:
    conv = nn.Conv2d(4, 6, 3)
    ws = ws_class(nn.Conv2d).of(conv, adaptive=adaptive, eps=0.5)
    rows = conv.weight.detach().flatten(1).double()
    expected = (rows - rows.mean(1, keepdim=True)) / (rows.var(1, correction=0, keepdim=True) + 0.5).sqrt()
    expected = rows if adaptive else expected
    torch.testing.assert_close(ws.standardized_weight().detach().flatten(1).double(), expected, rtol=1e-5, atol=1e-6)


def test_arguments_by_name_reach_a_classs_own_forward() -> None:
    conv, ws = make(lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), adaptive=True)
    x = torch.randn(1, 4, 5, 5)
    torch.testing.assert_close(ws(x, output_size=(12, 12)), conv(x, output_size=(12, 12)), rtol=1e-4, atol=1e-5)


def test_layers_are_made_in_the_type_asked_for() -> None:
    twin = ws_class(nn.Conv2d).of(nn.Conv2d(4, 6, 3).half(), adaptive=True)
    assert {p.dtype for p in twin.parameters()} == {torch.float16}
