"""The formula of weight standardization."""

from typing import Any

import pytest
import torch
from timm.layers import StdConv2d
from torch import nn

from normswap.layers.convs import ws_class
from normswap.layers.standardization import EPS, by_filter, filters, kernel, standardize


def test_agrees_with_timm() -> None:
    ours = ws_class(nn.Conv2d).of(nn.Conv2d(4, 6, 3), adaptive=False)
    theirs = StdConv2d(4, 6, 3, padding=0, bias=True)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 4, 9, 9)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_agrees_with_the_small_epsilon_of_big_transfer() -> None:
    rows = torch.randn(8, 27) * 0.05
    var, mean = torch.var_mean(rows, dim=1, keepdim=True, correction=0)
    theirs = (rows - mean) / torch.sqrt(var + 1e-10)
    stated = float((EPS / (2 * var)).max())
    assert (standardize(rows) - theirs).abs().max() <= 1.1 * stated * theirs.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_statistics_do_not_underflow(dtype: torch.dtype) -> None:
    rows = (torch.randn(4, 64) * 1e-4).to(dtype)
    result = standardize(rows, eps=1e-12)
    assert result.dtype == torch.float32
    assert (result.var(1, correction=0) - 1).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("shape", "transposed", "groups"), [((6, 2, 3), False, 2), ((4, 3, 3), True, 2), ((4, 6, 1), True, 1)]
)
def test_filters_and_kernel_undo_each_other(shape: tuple[int, ...], transposed: bool, groups: int) -> None:
    weight = torch.randn(shape)
    rows = filters(weight, transposed=transposed, groups=groups)
    assert torch.equal(kernel(rows, weight, transposed=transposed, groups=groups), weight)


@pytest.mark.parametrize(
    ("shape", "memory_format"), [((6, 4, 3, 5), torch.channels_last), ((6, 4, 3, 5, 2), torch.channels_last_3d)]
)
def test_channels_last_filters_are_not_copied(shape: tuple[int, ...], memory_format: torch.memory_format) -> None:
    contiguous = torch.randn(shape)
    weight = contiguous.to(memory_format=memory_format)
    rows = filters(weight)
    assert rows.data_ptr() == weight.data_ptr()
    back = kernel(rows, weight)
    assert torch.equal(back, contiguous)
    assert back.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(kernel(standardize(rows), weight), kernel(standardize(filters(contiguous)), contiguous))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("affine", [False, True], ids=["standard", "adaptive"])
@pytest.mark.parametrize(
    ("shape", "transposed", "last"),
    [((6, 2, 3), False, False), ((4, 6, 3, 3), True, False), ((6, 4, 3, 5), False, True)],
    ids=["1d", "transposed", "channels last"],
)
def test_a_compiler_is_given_the_same(
    shape: tuple[int, ...], transposed: bool, last: bool, affine: bool, dtype: torch.dtype, monkeypatch: Any
) -> None:
    weight = (1 + torch.randn(shape)).to(dtype)
    weight = weight.contiguous(memory_format=torch.channels_last) if last else weight
    gain, offset = (torch.rand(6) + 0.5, torch.randn(6)) if affine else (None, None)
    rows = by_filter(weight, transposed=transposed)
    expected = standardize(filters(weight, transposed=transposed), gain=gain, offset=offset)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    found = standardize(rows, gain=gain, offset=offset)
    assert (found.shape, found.dtype) == (rows.shape, expected.dtype)
    torch.testing.assert_close(
        kernel(found, weight, transposed=transposed), kernel(expected, weight, transposed=transposed)
    )
    torch.testing.assert_close(found.flatten(1), expected)
