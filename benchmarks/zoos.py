"""The zoos that the coverage sweep converts: names, and how each network is built."""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

SMP_DECODERS = "Unet UnetPlusPlus MAnet Linknet FPN PSPNet DeepLabV3 DeepLabV3Plus PAN UPerNet Segformer".split()
SMP_ENCODERS = """resnet18 resnet50 resnext50_32x4d dpn68 vgg11_bn vgg16_bn se_resnet50 densenet121 inceptionresnetv2
inceptionv4 xception mobilenet_v2 mobileone_s0 mit_b0 efficientnet-b0 timm-efficientnet-b0 timm-tf_efficientnet_lite0
timm-skresnet18 tu-regnety_002 tu-resnest14d""".split()

Build = Callable[[], nn.Module]


def timm_zoo() -> Iterator[tuple[str, Build]]:
    """Yield every registered timm network."""
    import timm

    for name in timm.list_models():
        yield name, functools.partial(timm.create_model, name)


def torchvision_zoo() -> Iterator[tuple[str, Build]]:
    """Yield every network of torchvision but the quantized ones."""
    from torchvision import models

    with_backbone = {*models.list_models(models.segmentation), *models.list_models(models.detection)}
    for name in models.list_models():
        if not name.startswith("quantized_"):
            options: dict[str, Any] = {"weights_backbone": None} if name in with_backbone else {}
            yield name, functools.partial(models.get_model, name, weights=None, **options)


def detection_zoo() -> Iterator[tuple[str, Build]]:
    """Yield torchvision's detection and optical-flow networks, and Faster R-CNN on a frozen backbone."""
    from torchvision import models

    for name in models.list_models(models.detection):
        yield name, functools.partial(models.get_model, name, weights=None, weights_backbone=None)
    for name in models.list_models(models.optical_flow):
        yield name, functools.partial(models.get_model, name, weights=None)
    for backbone in ("resnet18", "resnet50"):
        yield f"fasterrcnn_{backbone}_frozen", functools.partial(_frozen_faster_rcnn, backbone)


def smp_zoo() -> Iterator[tuple[str, Build]]:
    """Yield every decoder of segmentation-models-pytorch on every encoder of the list."""
    import segmentation_models_pytorch as smp

    for decoder, encoder in itertools.product(SMP_DECODERS, SMP_ENCODERS):
        yield f"{decoder}/{encoder}", functools.partial(getattr(smp, decoder), encoder, encoder_weights=None)


def _frozen_faster_rcnn(backbone: str) -> nn.Module:
    from torchvision.models import detection
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    body = resnet_fpn_backbone(backbone_name=backbone, weights=None)
    model: nn.Module = detection.FasterRCNN(body, num_classes=91)
    return model


ZOOS: dict[str, Callable[[], Iterator[tuple[str, Build]]]] = {
    "timm": timm_zoo,
    "torchvision": torchvision_zoo,
    "detection": detection_zoo,
    "smp": smp_zoo,
}


def build_on_meta(build: Build) -> nn.Module:
    """Build without data; networks that compute with weights while they are built are built for real."""
    try:
        with torch.device("meta"):
            return build()
    except (NotImplementedError, RuntimeError):
        return build()
