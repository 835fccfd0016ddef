"""Real networks of timm and torchvision."""

import warnings
from collections import Counter
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from timm.layers import BatchNormAct2d
from torch import nn

import normswap
from normswap.layers.norms import GroupNormAct
from normswap.networks.recognition import is_batch_norm
from normswap.sources.registry import find

TIMM = """resnet50 efficientnet_b0 mobilenetv3_large_100 regnety_002 densenet121 inception_v3 resnetv2_50
tf_efficientnetv2_b0 vovnet39a dpn48b repvgg_a0 cspresnet50 hrnet_w18_small xception41 levit_128 mobileone_s0""".split()
TORCHVISION = "resnet18 googlenet deeplabv3_resnet50 r3d_18 mobilenet_v3_small".split()
NAMES = [f"timm/{name}" for name in TIMM] + [f"torchvision/{name}" for name in TORCHVISION]
SMALL = ["timm/efficientnet_b0", "timm/levit_128", "timm/regnety_002", "torchvision/googlenet"]


def build(name: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision announces a change of its initialization
        torch.manual_seed(0)
        return find(name).build()


def activations(model: nn.Module) -> Counter[str]:
    """Count the activations that norms carry, by class."""
    return Counter(
        type(norm.act).__name__ for norm in model.modules() if isinstance(norm, (BatchNormAct2d, GroupNormAct))
    )


@pytest.mark.parametrize("name", NAMES)
def test_converts_without_losing_an_activation(name: str) -> None:
    model = build(name)
    norms = sum(is_batch_norm(module) for module in model.modules())
    result = normswap.convert(model)
    assert not any(is_batch_norm(module) for module in result.modules())
    assert sum(isinstance(module, nn.GroupNorm) for module in result.modules()) == norms
    carried = activations(result)
    carried.subtract({"Identity": carried["Identity"]})
    before = activations(model)
    before.subtract({"Identity": before["Identity"]})
    assert carried == before


@pytest.mark.parametrize("name", SMALL)
def test_checks_hold(name: str) -> None:
    model = build(name)
    checks = normswap.check(normswap.convert(model), model)
    assert checks, str(checks)


@pytest.mark.sweep
@pytest.mark.parametrize("name", NAMES)
def test_checks_hold_on_every_network_of_the_list(name: str) -> None:
    model = build(name)
    checks = normswap.check(normswap.convert(model), model)
    assert checks, str(checks)


def test_resnet50_is_converted_whole() -> None:
    plan = normswap.inspect(build("timm/resnet50"))
    assert [entry.groups for entry in plan.norms] == [32] * 53
    assert sum(entry.changes for entry in plan.convs) == 53


def test_groups_count_as_the_plan_says() -> None:
    result = normswap.convert(build("timm/efficientnet_b0"), groups=16)
    modules = dict(result.named_modules())
    for entry in normswap.plan_of(result).norms:
        norm = modules[entry.name]
        assert (norm.num_groups, norm.num_channels, norm.eps) == (entry.groups, entry.channels, entry.eps)


@pytest.mark.parametrize(
    ("name", "norm", "fed_by"),
    [
        ("timm/resnet50", "layer1.0.bn3", {"layer1.0.conv3"}),
        ("timm/levit_128", "stages.0.blocks.0.attn.qkv.bn", {"stages.0.blocks.0.attn.qkv.linear"}),
        ("timm/mobileone_s0", "stages.0.1.identity", {"<relu>"}),
        (
            "timm/resnetv2_50",
            "stages.0.blocks.1.norm1",
            {"stages.0.blocks.0.downsample.conv", "stages.0.blocks.0.conv3"},
        ),
    ],
)
def test_parents(name: str, norm: str, fed_by: set[str]) -> None:
    entries = {entry.name: entry for entry in normswap.inspect(build(name)).norms}
    assert set(entries[norm].fed_by) == fed_by


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "timm config": lambda: timm.create_model("test_efficientnet"),
    "torchvision": lambda: torchvision.models.resnet18(num_classes=3),
    "one channel": lambda: timm.create_model("resnet18", in_chans=1),
}


@pytest.mark.parametrize("build_one", FAMILIES.values(), ids=FAMILIES)
def test_needs_nothing_but_the_model(build_one: Callable[[], nn.Module]) -> None:
    model = build_one()
    assert normswap.check(normswap.convert(model), model)
