"""Packages that look at a network: counters, summaries, explanations, features in between."""

import pytest
import torch
from equality import off
from nets import SMALL_IMAGES as X
from nets import small_resnet
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.feature_extraction import create_feature_extractor

import normswap

pytestmark = pytest.mark.filterwarnings("ignore")


def test_torch_counts_the_operations_of_the_original(trained: nn.Module) -> None:
    counted = []
    for model in (small_resnet(), trained):
        with FlopCounterMode(display=False) as counter:
            model(X)
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 70_000_000


def test_torchinfo_counts_convolutions_and_parameters_as_in_the_original(trained: nn.Module) -> None:
    torchinfo = pytest.importorskip("torchinfo")
    found = [torchinfo.summary(model, input_data=X, verbose=0) for model in (small_resnet(), trained)]
    assert found[0].total_params == found[1].total_params
    assert abs(found[0].total_mult_adds - found[1].total_mult_adds) < 1e-3 * found[0].total_mult_adds


def test_thop_looks_types_up_and_counts_a_folded_network_as_the_original(trained: nn.Module) -> None:
    thop = pytest.importorskip("thop")
    norms = {nn.BatchNorm2d: None, nn.GroupNorm: None}  # theirs are others by nature
    counts = [
        thop.profile(model, inputs=(X,), verbose=False, custom_ops=norms)[0]
        for model in (small_resnet(), normswap.fold(trained), trained)
    ]
    assert counts[0] == counts[1] > 30_000_000
    assert counts[2] < counts[0] / 100


def test_features_between_are_those_that_the_network_computes(trained: nn.Module) -> None:
    seen: list[Tensor] = []
    trained.layer1.register_forward_hook(lambda *args: seen.append(args[2]))  # type: ignore[union-attr, operator]
    expected = trained(X)
    features = create_feature_extractor(trained, {"layer1": "low", "fc": "out"})(X)
    assert torch.equal(features["out"], expected)
    assert torch.equal(features["low"], seen[0])
    assert torch.equal(IntermediateLayerGetter(trained, {"layer1": "low"})(X)["low"], seen[0])


def test_captum_attributes_to_the_input_and_to_a_layer(trained: nn.Module) -> None:
    attr = pytest.importorskip("captum.attr")
    folded = normswap.fold(trained)
    for method in (
        lambda model: attr.Saliency(model).attribute(X, target=0),
        lambda model: attr.IntegratedGradients(model).attribute(X, target=0, n_steps=3),
        lambda model: attr.LayerGradCam(model, model.layer1).attribute(X, target=0),
    ):
        ours, theirs = method(trained), method(folded)
        assert float(ours.abs().sum()) > 0
        assert off(ours, theirs) < 1e-4


def test_grad_cam_hooks_a_weight_standardized_convolution(trained: nn.Module) -> None:
    cam = pytest.importorskip("pytorch_grad_cam")
    targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets")
    maps = []
    for model in (trained, normswap.fold(trained)):
        with cam.GradCAM(model=model, target_layers=[model.layer1[0].conv2]) as explain:  # type: ignore[index]
            maps.append(explain(input_tensor=X, targets=[targets.ClassifierOutputTarget(0)] * 2))
    assert maps[0].max() > 0
    assert abs(maps[0] - maps[1]).max() < 1e-4
