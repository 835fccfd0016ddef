"""Fine-tune a converted network at batch size 1 with gradient accumulation, in plain PyTorch.

python examples/finetune.py            # the shipped digits; swap in your own network and data
"""

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import normswap
from normswap.digits import digits_resnet, load_digits

ACCUMULATE, STEPS = 4, 50


def main() -> None:
    """Convert, train with one image at a time, save."""
    torch.manual_seed(0)
    images, labels, test_images, test_labels = load_digits()
    model = normswap.convert(digits_resnet(), example_input=images[:2])
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=3e-3, momentum=0.9)
    batches = iter(DataLoader(TensorDataset(images, labels), batch_size=1, shuffle=True))
    for step in range(STEPS):
        for _ in range(ACCUMULATE):
            image, label = next(batches)
            (F.cross_entropy(model(image), label) / ACCUMULATE).backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 10 == 0:
            with torch.no_grad():
                hits = (model(test_images).argmax(1) == test_labels).float().mean()
            print(f"step {step + 1}: {100 * hits:.1f} % of the test images")


if __name__ == "__main__":
    main()
