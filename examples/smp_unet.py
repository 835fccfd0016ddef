"""Convert a U-Net of segmentation-models-pytorch, encoder and decoder, and train it one image at a time.

python examples/smp_unet.py IMAGES                 # here: find the bright pixels; swap in your own masks
"""

import sys

import segmentation_models_pytorch as smp
import torch
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

import normswap

EPOCHS = 3


def build() -> torch.nn.Module:
    """Return the unconverted network; encoder_weights="imagenet" starts from a trained encoder."""
    return smp.Unet("resnet18", encoder_weights=None, in_channels=3, classes=1)


def main(images: str) -> None:
    """Convert, train, save and load."""
    torch.manual_seed(0)
    data = ImageFolder(images, transforms.Compose([transforms.Resize((64, 64)), transforms.ToTensor()]))
    model = normswap.convert(build(), example_input=torch.zeros(1, 3, 64, 64)).train()
    dice = smp.losses.DiceLoss("binary")
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    for epoch in range(EPOCHS):
        total = 0.0
        for image, _ in DataLoader(data, batch_size=1, shuffle=True):
            mask = (image.mean(1, keepdim=True) > image.mean()).float()
            loss = dice(model(image), mask)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        print(f"epoch {epoch + 1}: loss {total / len(data):.3f}")
    normswap.save(model, "unet")
    again = normswap.load("unet", model=build())
    sample = data[0][0][None]
    torch.testing.assert_close(again(sample), model.eval()(sample))


if __name__ == "__main__":
    main(sys.argv[1])
