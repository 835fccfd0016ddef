"""Fine-tune a converted checkpoint with differential privacy (DP-SGD of Opacus).

python examples/opacus_dp.py OUT IMAGES            # OUT: what normswap convert wrote; IMAGES: one folder per class
"""

import sys

import torch
import torch.nn.functional as F
from opacus import PrivacyEngine
from opacus.validators import ModuleValidator
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

import normswap

EPOCHS, BATCH, DELTA = 3, 6, 1e-3


def main(checkpoint: str, images: str) -> None:
    """Load, train privately, and read the state dict back."""
    torch.manual_seed(0)
    data = ImageFolder(images, transforms.Compose([transforms.Resize((64, 64)), transforms.ToTensor()]))
    model = normswap.out_of_place(normswap.load(checkpoint, num_classes=len(data.classes))).train()
    assert ModuleValidator.is_valid(model)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=1e-3)
    engine = PrivacyEngine()
    private, optimizer, loader = engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(data, batch_size=BATCH),
        noise_multiplier=0.5,
        max_grad_norm=1.0,
    )
    for epoch in range(EPOCHS):
        total, seen = 0.0, 0
        for image, label in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(private(image), label)
            loss.backward()
            optimizer.step()
            total, seen = total + loss.item() * len(label), seen + len(label)
        print(f"epoch {epoch + 1}: loss {total / max(seen, 1):.3f}, spent epsilon {engine.get_epsilon(DELTA):.1f}")
    torch.save(private.state_dict(), "tuned.pth")
    again = normswap.load(checkpoint, num_classes=len(data.classes), weights="tuned.pth")
    sample = data[0][0][None]
    torch.testing.assert_close(again(sample), private.eval()(sample))


if __name__ == "__main__":
    main(*sys.argv[1:3])
