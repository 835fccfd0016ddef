"""What replacements are built from."""

import pytest
import torch
import torch.nn.utils.prune
from nets import CASES, conv
from torch import nn

import normswap


def small() -> nn.Sequential:
    return nn.Sequential(conv(3, 16), nn.BatchNorm2d(16, eps=1e-3), nn.ReLU(), conv(16, 16), nn.BatchNorm2d(16))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtype_is_carried(dtype: torch.dtype) -> None:
    result = normswap.convert(small().to(dtype))
    assert {p.dtype for p in result.parameters()} == {dtype}
    assert result(torch.randn(1, 3, 8, 8, dtype=dtype)).dtype == dtype


def test_frozen_norm_buffers_become_the_affine_part() -> None:
    case = CASES["duck-typed frozen"]
    model = case.build()
    result = normswap.convert(model, example_input=torch.zeros(case.shape), affine="copy")
    assert result.bn.weight.eq(1.5).all()  # type: ignore[union-attr]
    assert result.bn.bias.eq(0.5).all()  # type: ignore[union-attr]
    assert not result.bn.weight.requires_grad  # type: ignore[union-attr]
    assert "bn.weight" in dict(result.named_parameters())


@pytest.mark.parametrize(
    "others",
    [nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 4, 1), nn.Identity()],
    ids=["buffers", "parameters", "none"],
)
def test_norms_without_tensors_get_the_type_of_the_network_or_its_input(others: nn.Module) -> None:
    model = nn.Sequential(nn.BatchNorm2d(4, affine=False, track_running_stats=False), others).double().eval()
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    result = normswap.convert(model, groups=2, example_input=x)
    assert {p.dtype for p in result.parameters()} == {torch.float64}
    assert result(x).dtype == torch.float64
