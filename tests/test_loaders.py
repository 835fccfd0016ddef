"""Real networks through every loader: the same state bit for bit, the same outputs, and heads of another size."""

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from equality import assert_same_output, assert_same_state
from safetensors.torch import load_file
from timm.models import save_for_hf
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import AutoModelForImageClassification

import normswap
from normswap.sources.registry import Source, find

NETWORKS = {
    "timm/resnet50": 64,
    "timm/efficientnet_b0": 64,
    "timm/regnety_002": 64,
    "timm/levit_128": 224,
    "torchvision/deeplabv3_resnet50": 64,
}
"""Names, with the side of an input."""


def trained(source: Source) -> nn.Module:
    """Build a network whose norms look trained."""
    torch.manual_seed(0)
    model = source.build().eval()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


def from_state_dict(folder: Path, source: Source, classes: int | None) -> nn.Module:
    """Go on from a bare state dict, as after fine-tuning."""
    arguments = {} if classes is None else {"num_classes": classes}
    model = normswap.apply(source.build(**arguments), folder / "config.json").eval()
    state = (
        normswap.load(folder, num_classes=classes).state_dict() if classes else load_file(folder / "model.safetensors")
    )
    model.load_state_dict(state, strict=True)
    return model


def from_timm(folder: Path, _: Source, classes: int | None) -> nn.Module:
    return timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=classes).eval()


def from_timms_export(folder: Path, source: Source, classes: int | None) -> nn.Module:
    model = from_timm(folder, source, None)
    save_for_hf(model, str(folder / "export"), safe_serialization=True)
    return from_timm(folder / "export", source, classes)


def from_transformers(folder: Path, _: Source, classes: int | None) -> nn.Module:
    changed = {} if classes is None else {"num_labels": classes, "ignore_mismatched_sizes": True}
    return AutoModelForImageClassification.from_pretrained(folder, **changed).eval()


LOADERS: dict[str, Callable[[Path, Source, int | None], nn.Module]] = {
    "normswap.load": lambda folder, _, classes: normswap.load(folder, num_classes=classes),
    "apply and load_state_dict": from_state_dict,
    "timm local-dir": from_timm,
    "timm save_for_hf": from_timms_export,
    "transformers": from_transformers,
}


def output(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        result = model(x)
    if isinstance(result, dict):  # torchvision's segmentation networks and transformers' wrapper
        return result["out" if "out" in result else "logits"]
    return result


@pytest.mark.parametrize("name", NETWORKS)
def test_every_loader_gives_the_same_network(name: str, tmp_path: Path) -> None:
    source = find(name)
    converted = normswap.convert(trained(source)).eval()
    normswap.save(converted, tmp_path, source=source)
    x = torch.randn(2, 3, NETWORKS[name], NETWORKS[name])
    expected = output(converted, x)
    loaders = LOADERS if source.registry == "timm" else dict(list(LOADERS.items())[:3])
    with torch.random.fork_rng():
        for loader, load in loaders.items():
            loaded = load(tmp_path, source, None)
            found, shape = output(loaded, x), tuple(output(load(tmp_path, source, 7), x).shape)
            print(f"{name}: {loader}: off by {(found - expected).abs().max():.1e}; with 7 classes {shape}")
            assert_same_state(loaded, converted, prefix="timm_model.")
            assert_same_output(found, expected)
            assert shape == (2, 7, *expected.shape[2:])
