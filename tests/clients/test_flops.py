"""ptflops looks layers up by their exact type, and so counts a folded network as it counts the original."""

import pytest
import timm
import torch
from ptflops import get_model_complexity_info
from torch import nn

import normswap


def convolving(model: nn.Module, backend: str) -> int:
    """Count the multiply-adds of convolutions alone: the norms' are others by nature."""
    model = model.eval()
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, (nn.BatchNorm2d, nn.GroupNorm)):
                setattr(module, name, nn.Identity())
    macs, _ = get_model_complexity_info(
        model, (3, 32, 32), as_strings=False, print_per_layer_stat=False, verbose=False, backend=backend
    )
    return int(macs)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", ["pytorch", "aten"])
def test_folded_networks_count_as_the_original(backend: str) -> None:
    torch.manual_seed(0)
    original = timm.create_model("resnet18", num_classes=5, norm_layer=nn.BatchNorm2d)
    converted = normswap.convert(original)
    expected = convolving(original, backend)
    assert expected > 30_000_000
    assert convolving(normswap.fold(converted), backend) == expected
    if backend == "pytorch":  # weight-standardized convolutions are of no type in its list
        assert convolving(converted, backend) < expected / 10
