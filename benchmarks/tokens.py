"""How much networks of linear layers on tokens keep: digits as patches, BatchNorm on tokens as samples or as positions.

python benchmarks/tokens.py     # trains two networks; two minutes on one core; the table goes to docs/equalization.md

An embedding of 2×2 patches, then twice a layer that mixes patches and two that mix channels, as in LeViT and MLP-Mixer.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normswap
from normswap.demo.comparison import accuracy
from normswap.demo.digits import load_digits

WIDTH, PATCHES, STEPS, RATE, BATCH = 48, 16, 900, 3e-3, 64


class Normed(nn.Module):
    """A linear layer on tokens (N, T, C) and a BatchNorm: of (N·T, C) where tokens are samples, else of (N, C, T)."""

    def __init__(self, inputs: int, outputs: int, *, flat: bool) -> None:
        super().__init__()
        self.linear, self.norm, self.flat = nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), flat

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return F.hardswish(self.norm(y.flatten(0, 1)).view_as(y) if self.flat else self.norm(y.mT).mT)


class Tokens(nn.Module):
    """Ten digits from images (N, 1, 8, 8)."""

    def __init__(self, *, flat: bool) -> None:
        super().__init__()
        self.embed = Normed(4, WIDTH, flat=flat)
        self.across = nn.ModuleList(nn.Linear(PATCHES, PATCHES) for _ in range(2))
        self.within = nn.ModuleList(
            nn.Sequential(Normed(WIDTH, 2 * WIDTH, flat=flat), Normed(2 * WIDTH, WIDTH, flat=flat)) for _ in range(2)
        )
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(F.unfold(x, 2, stride=2).mT)
        for across, within in zip(self.across, self.within, strict=True):
            x = x + across(x.mT).mT
            x = x + within(x)
        return self.head(x.mean(1))


def trained(images: Tensor, labels: Tensor, *, flat: bool) -> Tokens:
    """Train with AdamW and one learning rate cycle."""
    torch.manual_seed(0)
    model = Tokens(flat=flat).train()
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
    for _ in range(STEPS):
        rows = torch.randint(len(images), (BATCH,))
        optimizer.zero_grad()
        F.cross_entropy(model(images[rows]), labels[rows]).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


if __name__ == "__main__":
    torch.set_num_threads(1)
    images, labels, test_images, test_labels = load_digits()
    sources: list[dict[str, Any]] = [{"equalize": False}, {}, {"batches": "synthetic"}, {"batches": [images[:128]]}]
    for flat in (True, False):
        model = trained(images, labels, flat=flat)
        answers = model(test_images).argmax(1)
        right = accuracy(model, test_images, test_labels)
        print(
            f"tokens as {'samples' if flat else 'positions'}: the original has {right:.1f} % right; agreement with it"
        )
        for groups in ("auto", 1, 8, 32):
            made = (normswap.convert(model, example_input=images[:2], groups=groups, **source) for source in sources)
            print(f"| {groups} | {' | '.join(f'{accuracy(own, test_images, answers):.1f}' for own in made)} |")
