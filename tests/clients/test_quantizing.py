"""Quantization by torchao and by torch's graphs: outputs move by the rounding that was asked for."""

import pytest
import torch
from equality import off
from nets import SMALL_IMAGES as X
from torch import nn
from torch.ao.quantization import get_default_qconfig_mapping, quantize_dynamic, quantize_fx

pytestmark = pytest.mark.filterwarnings("ignore")


def test_weights_of_linear_layers(trained: nn.Module) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    expected = trained(X)
    assert 0 < off(quantize_dynamic(trained, {nn.Linear}, dtype=torch.qint8)(X), expected) < 0.05
    quantization.quantize_(trained, quantization.Int8WeightOnlyConfig())
    assert 0 < off(trained(X), expected) < 0.05


def test_a_traced_graph(trained: nn.Module) -> None:
    expected = trained(X)
    prepared = quantize_fx.prepare_fx(trained, get_default_qconfig_mapping("x86"), (X,))
    prepared(X)
    assert 0 < off(quantize_fx.convert_fx(prepared)(X), expected) < 0.2


def test_an_exported_graph(trained: nn.Module) -> None:
    steps = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
    x86 = pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    expected = trained(X)
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = steps.prepare_pt2e(torch.export.export(trained, (X,)).module(), quantizer)
    prepared(X)
    assert 0 < off(steps.convert_pt2e(prepared)(X), expected) < 0.2
