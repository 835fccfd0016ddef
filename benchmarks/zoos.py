"""The zoos that the coverage sweep converts: names, and how each network is built."""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

SMP_DECODERS = "Unet UnetPlusPlus MAnet Linknet FPN PSPNet DeepLabV3 DeepLabV3Plus PAN UPerNet Segformer".split()
SMP_ENCODERS = """resnet18 resnet50 resnext50_32x4d resnest50d res2net50_26w_4s regnety_002 dpn68 vgg16_bn densenet121
inceptionresnetv2 inceptionv4 efficientnet-b0 timm-efficientnet-b0 timm-skresnet18 timm-mobilenetv3_large_100
mobilenet_v2 xception mobileone_s0 se_resnet50 tu-convnext_atto""".split()

Build = Callable[[], nn.Module]


def timm_zoo() -> Iterator[tuple[str, Build]]:
    """Yield every registered timm network."""
    import timm

    for name in timm.list_models():
        yield name, functools.partial(timm.create_model, name)


def torchvision_zoo() -> Iterator[tuple[str, Build]]:
    """Yield the classification, segmentation and video networks of torchvision."""
    from torchvision import models

    modules = (models, models.segmentation, models.video)
    for name in sorted({name for module in modules for name in models.list_models(module)}):
        options: dict[str, Any] = {"weights": None}
        if name in models.list_models(models.segmentation):
            options["weights_backbone"] = None
        yield name, functools.partial(models.get_model, name, **options)


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
