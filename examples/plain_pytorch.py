"""Fine-tune a converted checkpoint one image at a time, with gradient accumulation, in plain PyTorch.

python examples/plain_pytorch.py OUT IMAGES        # OUT: what normswap convert wrote; IMAGES: one folder per class
"""

import sys

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

import normswap

ACCUMULATE, EPOCHS = 4, 3


def main(checkpoint: str, images: str) -> None:
    """Load with a new head, train, save the state dict and load it again."""
    torch.manual_seed(0)
    preprocess = transforms.Compose([transforms.Resize((64, 64)), transforms.ToTensor()])
    data = ImageFolder(images, preprocess)
    model = normswap.load(checkpoint, num_classes=len(data.classes))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.01, momentum=0.9)
    for epoch in range(EPOCHS):
        model.train()
        total = 0.0
        for step, (image, label) in enumerate(DataLoader(data, batch_size=1, shuffle=True), start=1):
            loss = F.cross_entropy(model(image), label)
            (loss / ACCUMULATE).backward()
            total += loss.item()
            if step % ACCUMULATE == 0:
                optimizer.step()
                optimizer.zero_grad()
        print(f"epoch {epoch + 1}: loss {total / len(data):.3f}")
    torch.save(model.state_dict(), "tuned.pth")
    again = normswap.load(checkpoint, num_classes=len(data.classes), weights="tuned.pth")
    sample = data[0][0][None]
    torch.testing.assert_close(again(sample), model.eval()(sample))


if __name__ == "__main__":
    main(*sys.argv[1:3])
