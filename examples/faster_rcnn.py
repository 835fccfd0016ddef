"""Convert a Faster R-CNN of torchvision whose backbone has frozen BatchNorm, and train it one image at a time.

python examples/faster_rcnn.py IMAGES              # here: one box around every image; swap in your own boxes
"""

import sys

import torch
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

import normswap

EPOCHS, SIDE = 2, 64


def build(classes: int) -> FasterRCNN:
    """Return the unconverted network, as fasterrcnn_resnet50_fpn builds it, with a smaller backbone."""
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=5
    )
    small = {"min_size": SIDE, "max_size": SIDE, "rpn_post_nms_top_n_train": 100, "box_batch_size_per_image": 32}
    return FasterRCNN(backbone, num_classes=classes + 1, **small)


def main(images: str) -> None:
    """Convert, free the norms, train, save and load."""
    torch.manual_seed(0)
    data = ImageFolder(images, transforms.Compose([transforms.Resize((SIDE, SIDE)), transforms.ToTensor()]))
    model = normswap.convert(build(len(data.classes))).train()
    assert not any(isinstance(module, FrozenBatchNorm2d) for module in model.modules())
    for module in model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.requires_grad_(True)  # what was frozen stays frozen unless you say so
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.002, momentum=0.9)
    for epoch in range(EPOCHS):
        total = 0.0
        for image, label in DataLoader(data, batch_size=1, shuffle=True):
            box = torch.tensor([[8.0, 8.0, SIDE - 8.0, SIDE - 8.0]])
            losses = model(list(image), [{"boxes": box, "labels": label + 1}])
            loss = sum(losses.values())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            total += loss.item()
        print(f"epoch {epoch + 1}: loss {total / len(data):.3f}")
    normswap.save(model, "detector")
    again = normswap.load("detector", model=build(len(data.classes)))
    sample = [data[0][0]]
    ours, theirs = again(sample)[0], model.eval()(sample)[0]
    torch.testing.assert_close(ours["boxes"], theirs["boxes"], rtol=1e-3, atol=1e-2)


if __name__ == "__main__":
    main(sys.argv[1])
