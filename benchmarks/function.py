"""How much of what a network learned survives conversion, on Fashion-MNIST, by group count.

python benchmarks/function.py [--workers 2]     # resumable; the results go to docs/function.md by function_docs.py

Top-1 on all 10,000 test images. Calibration sees 1,024 training images without labels. Needs benchmarks/fashion.py.
"""

import argparse
import time
from collections.abc import Iterator

import torch
from fashion import accuracy, load, original
from records import Job, run_all
from torch import Tensor
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
    images, _, *test = load()
    model, groups = original(job["seed"]), job["groups"]
    chosen = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(job["seed"]))[:IMAGES]]
    learned, judged = chosen[:-128], chosen[-128:].split(64)
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
    normswap.calibrate(converted, model, learned.split(BATCH), held_back=judged)
    result["calibrated"] = accuracy(converted, *test)
    converted = normswap.convert(model, groups=groups)
    loader = DataLoader(Mirrored(learned), BATCH, shuffle=True, drop_last=True)
    started = time.perf_counter()
    normswap.calibrate(converted, model, loader, steps=STEPS, held_back=judged)
    result |= {"seconds": time.perf_counter() - started, "distilled": accuracy(converted, *test)}
    return result


def jobs() -> Iterator[Job]:
    """Yield every seed and group count."""
    for seed in (1, 2, 0):
        for groups in GROUPS:
            yield {"groups": groups, "seed": seed}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    run_all("function", measure, jobs(), workers=parser.parse_args().workers)
