"""What a network says of where it came from."""

from typing import Any

import pytest
import timm
import torchvision
from torch import nn

import normswap
from normswap.sources.provenance import recall, source_of


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("test_resnet", {}), ("test_resnet", {"num_classes": 7, "in_chans": 1}), ("test_resnet.r160_in1k", {})],
    ids=["name", "arguments", "tag"],
)
def test_timm_remembers_names_and_arguments(name: str, arguments: dict[str, int]) -> None:
    source = source_of(timm.create_model(name, **arguments))
    assert source == normswap.Source("timm", "test_resnet.r160_in1k", {"num_classes": 1000, **arguments})


@pytest.mark.parametrize("model", [nn.Linear(1, 1), torchvision.models.resnet18()], ids=["own network", "torchvision"])
def test_other_networks_do_not_know_their_names(model: nn.Module) -> None:
    assert source_of(model) is None
    assert source_of(normswap.convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))) is None


def test_a_converted_network_names_its_original_with_the_classes_it_has_now() -> None:
    model = timm.create_model("test_resnet", num_classes=7)
    converted = normswap.convert(model)
    assert source_of(converted) == source_of(model)
    converted.reset_classifier(3)  # type: ignore[operator]
    assert source_of(converted) == normswap.Source("timm", "test_resnet.r160_in1k", {"num_classes": 3})
    assert model.pretrained_cfg["architecture"] == "test_resnet"


@pytest.mark.parametrize(
    ("config", "mean"),
    [({"pretrained_cfg": {"mean": [0, 0, 0]}}, [0, 0, 0]), ({"pretrained_cfg": 3}, None), ({}, None)],
    ids=["stated", "no dict", "not stated"],
)
def test_a_checkpoints_preprocessing_is_taken_over(config: dict[str, Any], mean: list[int] | None) -> None:
    model = timm.create_model("test_resnet")
    usual = dict(model.pretrained_cfg)
    recall(model, config)
    assert model.pretrained_cfg == (usual if mean is None else {**usual, "mean": mean})
