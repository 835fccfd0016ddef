"""How much of what a network learned survives conversion, on Fashion-MNIST, by group count.

python benchmarks/function.py [--workers 2]     # resumable; the results go to docs/function.md by function_docs.py

Top-1 on all 10,000 test images. Calibration sees 1,024 training images without labels. Needs benchmarks/fashion.py.
"""

import argparse
import time
from collections.abc import Iterator
from typing import Any

import torch
from fashion import accuracy, load, original
from records import Job, run_all
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

import normswap

GROUPS: tuple[int | str, ...] = (32, 16, 8, 1, "auto")
IMAGES, BATCH, STEPS = 1024, 64, 300


class Mirrored(Dataset[Tensor]):
    """Images, each mirrored half of the time it is read."""

    def __init__(self, images: Tensor) -> None:
        self.images, self.flip = images, v2.RandomHorizontalFlip()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        flipped: Tensor = self.flip(self.images[index])
        return flipped


def measure(job: Job) -> Job:
    """Convert one network in every way and return its accuracies."""
    test = load()[2:]
    model, groups = original(job["seed"]), job["groups"]
    forms = {
        "copied": {"affine": "copy", "ws": "adaptive"},
        "copied + standard WS": {"affine": "copy", "ws": "standard"},
        "closed form, shrink=0": {"shrink": 0},
        "closed form": {"ws": "none"},
        "closed form + adaptive WS": {},
        "closed form + adaptive WS, shrink=1": {"shrink": 1},
    }
    result = {"BN": accuracy(model, *test)}
    for name, options in forms.items():
        result[name] = accuracy(normswap.convert(model, groups=groups, **options), *test)  # type: ignore[arg-type]
    converted = normswap.convert(model, groups=groups)
    learned, judged = unlabeled(job["seed"])
    normswap.calibrate(converted, model, learned.split(BATCH), held_back=judged)
    result["calibrated"] = accuracy(converted, *test)
    started = time.perf_counter()
    converted = distilled(model, job["seed"], groups=groups)
    result |= {"seconds": time.perf_counter() - started, "distilled": accuracy(converted, *test)}
    return result


def unlabeled(seed: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return training images to learn from and to judge by, 1,024 together."""
    images = load()[0]
    chosen = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:IMAGES]]
    return chosen[:-128], chosen[-128:].split(64)


def distilled(model: nn.Module, seed: int, **options: Any) -> nn.Module:
    """Convert and distill on 1,024 unlabeled images."""
    learned, judged = unlabeled(seed)
    loader = DataLoader(Mirrored(learned), BATCH, shuffle=True, drop_last=True)
    converted = normswap.convert(model, **options)
    return normswap.calibrate(converted, model, loader, steps=STEPS, held_back=judged)


def jobs() -> Iterator[Job]:
    """Yield every seed and group count."""
    for seed in (1, 2, 0):
        for groups in GROUPS:
            yield {"groups": groups, "seed": seed}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    run_all("function", measure, jobs(), workers=parser.parse_args().workers)
