"""Numbers at the edges of their types, against a float64 oracle written out here; tolerances follow each type's eps."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from equality import assert_same_output
from torch import Tensor, nn

import normswap
from normswap.layers.convs import WeightStandardized, ws_class
from normswap.layers.matching import centred, standardized_statistics
from normswap.layers.standardization import EPS

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=["f64", "f32", "bf16", "f16"]
)
FORMS = pytest.mark.parametrize("adaptive", [False, True], ids=["standard", "adaptive"])
KERNEL = 4  # times a type's eps, of the largest value: rounding of the gain, the offset and the kernel itself
SCALES = [1e-30, 1e-20, 1e-10, 1e-4, 1.0, 1e4, 1e10, 1e15]
FAN_INS = [2, 3, 9, 4608]


def oracle(rows: Tensor) -> Tensor:
    """(w − mean)/√(var + eps) in float64, var biased."""
    rows = rows.detach().double()
    off = rows - rows.mean(1, keepdim=True)
    return off / (off.square().mean(1, keepdim=True) + EPS).sqrt()


def convolution(rows: Tensor) -> nn.Conv1d:
    """A convolution whose filters are the rows."""
    conv = nn.Conv1d(1, len(rows), rows.shape[1], bias=False)
    conv.weight = nn.Parameter(rows[:, None])
    return conv


def expected(rows: Tensor, *, adaptive: bool) -> Tensor:
    return rows.double() if adaptive else oracle(rows)


def close(found: Tensor, wanted: Tensor, eps: float) -> None:
    scale = float(wanted.abs().max())
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=eps * scale)


@FORMS
@DTYPES
@pytest.mark.parametrize("fan_in", FAN_INS)
@pytest.mark.parametrize("scale", SCALES, ids="{:.0e}".format)
def test_kernels(dtype: torch.dtype, scale: float, fan_in: int, adaptive: bool) -> None:
    rows = (torch.randn(6, fan_in, dtype=torch.float64) * scale).to(dtype)
    if not torch.isfinite(rows).all():
        rows = rows.nan_to_num(posinf=6e4, neginf=-6e4)
    layer = ws_class(nn.Conv1d).of(convolution(rows), adaptive=adaptive)
    found = layer.standardized_weight()
    assert found.dtype == dtype
    exact = rows.double()
    cancelled = float((exact.mean(1).abs() / (exact.var(1, correction=0) + EPS).sqrt()).max())
    tolerance = KERNEL * torch.finfo(dtype).eps * (1 + cancelled)  # what is left of a filter once its mean is off
    wanted = expected(rows, adaptive=adaptive)
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    torch.testing.assert_close(
        found.detach().flatten(1).double(), wanted, rtol=0, atol=tolerance * float(wanted.abs().max()) + smallest
    )


@DTYPES
def test_the_variance_of_small_filters_does_not_underflow(dtype: torch.dtype) -> None:
    """1e-4 squared is 0 in float16; beside eps, 1e-6, it still is a hundredth of the variance."""
    rows = (torch.randn(6, 64, dtype=torch.float64) * torch.logspace(-5, -3, 6)[:, None]).to(dtype)
    found = ws_class(nn.Conv1d).of(convolution(rows), adaptive=False).standardized_weight().flatten(1)
    for ours, theirs in zip(found, oracle(rows), strict=True):
        close(ours, theirs, KERNEL * torch.finfo(dtype).eps)


@FORMS
@DTYPES
def test_gradients_of_small_and_constant_filters(dtype: torch.dtype, adaptive: bool) -> None:
    rows = (torch.randn(4, 18, dtype=torch.float64) * 1e-3).to(dtype)
    rows[1], rows[2] = 0.25, 0
    layer = ws_class(nn.Conv1d).of(convolution(rows), adaptive=adaptive)
    away = torch.randn(4, 18).to(dtype)
    layer.standardized_weight().backward(away[:, None])
    exact = rows.double().requires_grad_()
    mean = exact.mean(1, keepdim=True)
    var = (exact - mean).square().mean(1, keepdim=True)
    gain = (var.detach() + EPS).sqrt() if adaptive else 1.0
    ((exact - mean) / (var + EPS).sqrt() * gain).backward(away.double())
    assert exact.grad is not None
    assert layer.weight.grad is not None
    close(layer.weight.grad[:, 0], exact.grad, KERNEL * torch.finfo(dtype).eps)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e20, 1e30], ids=["nan", "inf", "1e20", "1e30"])
@pytest.mark.parametrize("ws", ["adaptive", "standard"])
@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "in place"])
def test_filters_without_a_variance_are_named(bad: float, ws: str, inplace: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    with torch.no_grad():
        model[0].weight[5, 1] = bad * torch.tensor([1.0, -1, 1])
    message = (
        "0: filters hold values whose squares overflow; repair the checkpoint or leave the layer plain with exclude="
    )
    if not math.isfinite(bad):
        message = "0.weight: holds NaN or infinity; repair the checkpoint or take an earlier one"
    with pytest.raises(normswap.BadStatistics, match=f"^{message}$"):
        normswap.convert(model, ws=ws, inplace=inplace)
    assert [type(module) for module in model] == [nn.Conv2d, nn.BatchNorm2d]
    assert isinstance(normswap.convert(model, ws=ws, exclude="0", check=False)[1], nn.GroupNorm)  # type: ignore[index]


@DTYPES
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-4, 1.0, 1e10, 1e30], ids="{:.0e}".format)
def test_centred_filters(dtype: torch.dtype, scale: float) -> None:
    """Zero mean and one common deviation, the root mean square of the filters' own; constant ones become zero."""
    spread = torch.tensor([1, 0.3, 2, 0, 1e-3])[:, None]
    if dtype == torch.float16:
        scale = min(max(scale, 1e-2), 1e3)
    rows = (torch.randn(5, 27, dtype=torch.float64) * spread * scale + 0.2 * scale).to(dtype)
    exact = rows.double()
    off = exact - exact.mean(1, keepdim=True)
    std = off.square().mean(1, keepdim=True).sqrt()
    wanted = torch.where(spread > 0, off / std, 0) * std.square().mean().sqrt()
    found = centred(rows)
    assert found.dtype == dtype
    if dtype in (torch.float64, torch.float32):  # of a spread a thousandth of the mean, the mean's rounding is 1e3 eps
        close(found[:4], wanted[:4], 16 * torch.finfo(dtype).eps)
        close(found[4], wanted[4], 1e4 * torch.finfo(dtype).eps)
    else:
        close(found, wanted, 2 * torch.finfo(dtype).eps)


def test_statistics_behind_constant_filters_are_the_bias() -> None:
    rows = torch.randn(4, 9)
    rows[2] = 0.1
    bias, mean, var = torch.randn(4), torch.randn(4), torch.rand(4) + 0.5
    found_mean, found_var = standardized_statistics(rows, bias, mean, var)
    std = rows.double().std(1, correction=0)
    scale = std.square().mean().sqrt() / std
    assert (found_mean[2], found_var[2]) == (bias[2], 0)
    for c in (0, 1, 3):
        assert found_mean[c].item() == pytest.approx(float((mean[c] - bias[c]) * scale[c] + bias[c]))
        assert found_var[c].item() == pytest.approx(float(var[c] * scale[c] ** 2))


def network() -> nn.Sequential:
    """A trained-looking network of three kinds of convolution."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, groups=4, bias=False), nn.BatchNorm2d(16, eps=1e-3), nn.ReLU(),
        nn.ConvTranspose2d(16, 6, 3, stride=2), nn.BatchNorm2d(6),
    )  # fmt: skip
    with torch.no_grad():
        for norm in (model[1], model[4], model[7]):
            norm.running_mean.normal_(std=0.2)
            norm.running_var.uniform_(0.3, 2)
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(std=0.3)
    return model.eval()


def plain_group_norm(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """Group by group, sample by sample, in float64."""
    result, size = torch.empty_like(x), norm.num_channels // norm.num_groups
    for n in range(len(x)):
        for first in range(0, norm.num_channels, size):
            group = x[n, first : first + size]
            off = group - group.mean()
            result[n, first : first + size] = off / (off.square().mean() + norm.eps).sqrt()
    shape = (-1, *(1 for _ in x.shape[2:]))
    return result * norm.weight.detach().double().view(shape) + norm.bias.detach().double().view(shape)


def plain_forward(model: nn.Module, x: Tensor) -> Tensor:
    """The converted network in float64, from its parameters alone."""
    x = x.double()
    for layer in model.children():
        if isinstance(layer, nn.GroupNorm):
            x = plain_group_norm(x, layer)
        elif isinstance(layer, WeightStandardized):
            x = _plain_convolution(layer, x)
        else:
            x = layer(x)
    return x


def _plain_convolution(layer: WeightStandardized, x: Tensor) -> Tensor:
    raw = layer._parameters["weight"].detach().double()  # type: ignore[union-attr]
    rows = raw.transpose(0, 1) if layer.transposed else raw
    kernel = oracle(rows.flatten(1))
    kernel = kernel * layer.ws_gain.detach().double()[:, None]  # type: ignore[union-attr]
    if layer.ws_offset is not None:
        kernel = kernel + layer.ws_offset.detach().double()[:, None]
    kernel = kernel.view(rows.shape)
    bias = None if layer.bias is None else layer.bias.detach().double()
    if layer.transposed:
        return F.conv_transpose2d(x, kernel.transpose(0, 1), bias, layer.stride, layer.padding)
    return F.conv2d(x, kernel, bias, layer.stride, layer.padding, layer.dilation, layer.groups)


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Refuse operators that may differ from run to run, and fill fresh memory with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


END_TO_END = 16  # times the type's eps, of the largest output: six layers
WAYS: dict[str, tuple[torch.dtype, float, Callable[[], AbstractContextManager[object]]]] = {
    "f64": (torch.float64, torch.finfo(torch.float64).eps, nullcontext),
    "f32": (torch.float32, torch.finfo(torch.float32).eps, nullcontext),
    "bf16": (torch.bfloat16, torch.finfo(torch.bfloat16).eps, nullcontext),
    "f16": (torch.float16, torch.finfo(torch.float16).eps, nullcontext),
    "autocast": (torch.float32, torch.finfo(torch.bfloat16).eps, partial(torch.autocast, "cpu", torch.bfloat16)),
}


@pytest.mark.parametrize("ws", ["adaptive", "standard"])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("way", WAYS)
def test_converted_and_folded_networks(way: str, memory: torch.memory_format, ws: str) -> None:
    dtype, eps, context = WAYS[way]
    model = network().to(dtype).to(memory_format=memory)
    x = torch.randn(2, 3, 9, 9).to(dtype).to(memory_format=memory)
    result = normswap.convert(model, ws=ws, groups=4)
    wanted = plain_forward(result, x)
    with torch.no_grad(), context():
        close(result(x), wanted, END_TO_END * eps)
        close(normswap.fold(result)(x), wanted, END_TO_END * eps)
    kernels = [m.standardized_weight() for m in result if isinstance(m, WeightStandardized)]  # type: ignore[union-attr]
    assert len(kernels) == 3
    assert all(kernel.is_contiguous(memory_format=memory) for kernel in kernels[:2])


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("ws", ["adaptive", "standard"])
def test_deterministic_mode_runs_and_repeats(ws: str) -> None:
    model, x = network(), torch.randn(2, 3, 9, 9)
    seen = []
    for _ in range(2):
        result = normswap.convert(model, ws=ws)
        output = result(x)
        output.square().mean().backward()
        seen.append([output.detach(), *(p.grad for p in result.parameters() if p.grad is not None)])
    close(seen[0][0], plain_forward(result, x), END_TO_END * torch.finfo(torch.float32).eps)
    assert len(seen[0]) == 12
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


@FORMS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_autocast_of_half_precision_filters(dtype: torch.dtype, adaptive: bool) -> None:
    """Autocast casts what standardization made, never what it reads."""
    rows = torch.randn(6, 64) * 1e-4
    layer = ws_class(nn.Conv1d).of(convolution(rows), adaptive=adaptive)
    with torch.autocast("cpu", dtype):
        kernel, output = layer.standardized_weight(), layer(torch.randn(2, 1, 64))
    assert kernel.dtype == torch.float32
    assert output.dtype == dtype
    close(kernel.detach().flatten(1), expected(rows, adaptive=adaptive), KERNEL * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("ws", ["adaptive", "standard"])
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-8, 1e8, 1e15], ids="{:.0e}".format)
def test_extreme_weights_end_to_end(scale: float, ws: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, eps=0 if scale > 1e-15 else 1e-5)).eval()
    with torch.no_grad():
        model[0].weight.mul_(scale)
        model[1].running_var.copy_(scale**2 * (torch.rand(8) + 0.5))
        model[1].running_mean.copy_(scale * torch.randn(8))
    x = torch.randn(2, 3, 9, 9)
    result = normswap.convert(model, ws=ws, groups=2)
    with torch.no_grad():
        found = result(x)
        close(found, plain_forward(result, x), 64 * torch.finfo(torch.float32).eps)
        assert_same_output(normswap.fold(result)(x), found)


@DTYPES
def test_the_closed_form_in_every_type(dtype: torch.dtype) -> None:
    """γ' = γ·√(σ² + ε')/√(v + ε) and β' = β − γ·(m − μ)/√(v + ε), with σ² and μ of the channel's group."""
    norm = network()[1].to(dtype)
    result = normswap.convert(norm, groups=2, example_input=torch.zeros(2, 8, 6, 6, dtype=dtype))
    m, v, weight, bias = (t.detach().double() for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias))
    for first in (0, 4):
        group = slice(first, first + 4)
        mu = m[group].mean()
        sigma = v[group].mean() + (m[group] - mu).square().mean()
        scale = weight[group] / (v[group] + norm.eps).sqrt()
        eps = torch.finfo(dtype).eps
        close(result.weight.detach()[group], scale * (sigma + result.eps).sqrt(), eps)  # type: ignore[union-attr, operator]
        close(result.bias.detach()[group], bias[group] - scale * (m[group] - mu), eps)  # type: ignore[union-attr, operator]
