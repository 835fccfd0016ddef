"""CoreML packages, from a trace and from an exported graph; what they compute only a Mac can tell."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from nets import SMALL_IMAGES as X
from nets import moved, small_resnet
from torch import nn

import normswap

ct = pytest.importorskip("coremltools")

pytestmark = pytest.mark.filterwarnings("ignore")


def converted_by_coremltools(model: nn.Module, how: str) -> object:
    inputs = [ct.TensorType("x", shape=X.shape)] if how == "trace" else None
    program = torch.jit.trace(model, X) if inputs else torch.export.export(model, (X,)).run_decompositions({})
    return ct.convert(program, inputs=inputs, minimum_deployment_target=ct.target.iOS16, skip_model_load=True)


@pytest.mark.parametrize("how", ["trace", "export"])
def test_a_package_holds_the_convolutions_and_takes_statistics_of_the_sample(how: str, tmp_path: Path) -> None:
    model = moved(normswap.convert(small_resnet(), example_input=X))
    package = converted_by_coremltools(normswap.fold(model), how)
    operations = package._mil_program.functions["main"].operations  # type: ignore[attr-defined]
    kinds = Counter(op.op_type for op in operations)
    assert kinds["conv"] == sum(isinstance(module, nn.Conv2d) for module in model.modules())
    assert kinds["reduce_mean"] >= sum(isinstance(module, nn.GroupNorm) for module in model.modules())
    affine = [
        op for op in operations if op.op_type == "batch_norm"
    ]  # CoreML's way to multiply and add, channel by channel
    assert all((op.mean.val == 0).all() and (op.variance.val == 1).all() for op in affine)
    package.save(str(tmp_path / "net.mlpackage"))  # type: ignore[attr-defined]
    size = sum(path.stat().st_size for path in (tmp_path / "net.mlpackage").rglob("*") if path.is_file())
    assert size > sum(p.numel() for p in model.parameters()) * 2  # half precision, CoreML's default
