"""Fashion-MNIST and the BatchNorm ResNet that the function benchmarks convert.

python benchmarks/fashion.py --seed 0      # trains once, about 12 minutes on one core; the weights stay in WORK

The images are Debian's: `apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist*.deb WORK`, where
WORK is benchmarks/work, or what the environment variable NORMSWAP_WORK says.
"""

import argparse
import functools
import gzip
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WORK = Path(os.environ.get("NORMSWAP_WORK", Path(__file__).parent / "work"))
EPOCHS, BATCH, LR = 12, 128, 0.1


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016, basic block)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        project = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.down = nn.Identity() if same else nn.Sequential(project, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.down(x))


class FashionResNet(nn.Module):
    """A ResNet of 9 convolutions for images (N, 1, 28, 28): 32 channels at 14x14, 64 at 7x7, 128 at 4x4."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 32, 3, 2, 1, bias=False)
        self.bn = nn.BatchNorm2d(32)
        self.blocks = nn.Sequential(Block(32, 32, 1), Block(32, 64, 2), Block(64, 128, 2))
        self.fc = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(F.relu(self.bn(self.conv(x)))).mean((2, 3)))


@functools.cache
def load() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return 60,000 training and 10,000 test images (N, 1, 28, 28), each with its labels."""
    folder = WORK / "usr/share/datasets/fashion-mnist"
    if not folder.exists():
        raise SystemExit(f"{folder} is missing; {__doc__}")
    parts = []
    for half in ("train", "t10k"):
        images, labels = (
            gzip.decompress((folder / f"{half}-{kind}-ubyte.gz").read_bytes())
            for kind in ("images-idx3", "labels-idx1")
        )
        pixels = torch.frombuffer(bytearray(images[16:]), dtype=torch.uint8).view(-1, 1, 28, 28)
        parts += [(pixels.float() / 255 - 0.286) / 0.353, torch.frombuffer(bytearray(labels[8:]), dtype=torch.uint8)]
    return parts[0], parts[1].long(), parts[2], parts[3].long()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return top-1 accuracy in percent, in eval mode."""
    model.eval()
    hits = sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(250), labels.split(250), strict=True))
    return 100 * hits / len(labels)


def train(seed: int, *, epochs: int = EPOCHS) -> FashionResNet:
    """Train with SGD, one learning rate cycle, weight decay 5e-4 and mirrored copies."""
    torch.manual_seed(seed)
    images, labels, *test = load()
    model = FashionResNet().to(memory_format=torch.channels_last)
    steps = len(images) // BATCH
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps * epochs, pct_start=0.2)
    for epoch in range(epochs):
        model.train()
        started = time.perf_counter()
        for rows in torch.randperm(len(images))[: steps * BATCH].view(steps, BATCH):
            batch = images[rows]
            batch = torch.where(torch.rand(BATCH, 1, 1, 1) < 0.5, batch.flip(3), batch)
            optimizer.zero_grad()
            F.cross_entropy(model(batch.contiguous(memory_format=torch.channels_last)), labels[rows]).backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}: {accuracy(model, *test):.2f} %, {time.perf_counter() - started:.0f} s", flush=True)
    return model.to(memory_format=torch.contiguous_format).eval()


def original(seed: int) -> FashionResNet:
    """Return the trained net of a seed; it is trained where that was not done before."""
    path = WORK / f"fashion-{seed}.pt"
    if not path.exists():
        torch.save(train(seed).state_dict(), path)
    model = FashionResNet()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    torch.set_num_threads(1)
    images, labels = load()[2:]
    print(f"{accuracy(original(parser.parse_args().seed), images, labels):.2f} % of the test images right")
