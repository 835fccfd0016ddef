"""How much of what a network learned survives conversion, on Fashion-MNIST, by group count.

python benchmarks/function.py [--workers 2]     # resumable; the results go to docs/function.md by function_docs.py

Top-1 on all 10,000 test images. Images that a conversion sees are training images without labels; distillation sees
1,024. Needs benchmarks/fashion.py's networks.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from fashion import WORK, accuracy, load, original
from records import Job, run_all
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

import normswap

USUAL = 32
GROUPS: tuple[int | str, ...] = (USUAL, "auto", 1, 8, 16)
IMAGES, BATCH, STEPS = 1024, 64, 500

FORMS: dict[str, Callable[[Tensor], dict[str, Any]]] = {
    "γ, β copied, standard WS": lambda images: {"affine": "copy", "ws": "standard"},
    "γ, β copied": lambda images: {"affine": "copy", "ws": "adaptive"},
    "not equalized": lambda images: {"equalize": False},
    "convert(model)": lambda images: {},
    "made-up images": lambda images: {"batches": "synthetic"},
    "128 images": lambda images: {"batches": images[:128].split(BATCH)},
    "256 images": lambda images: {"batches": images[:256].split(BATCH)},
}
"""Options of a conversion, by what a reader calls it."""

MATCHED = ("not equalized", "convert(model)", "made-up images", "256 images")
"""Those that are measured at other group counts, and at other shrinks, too."""

SHRINKS, FEWER = (0.5, 1.5, 4, 10, 30), 4000
"""What to compare the default shrink of the usual group count with, on so many of the test images."""


class Mirrored(Dataset[Tensor]):
    """Images, each mirrored half of the time it is read."""

    def __init__(self, images: Tensor) -> None:
        self.images, self.flip = images, v2.RandomHorizontalFlip()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        flipped: Tensor = self.flip(self.images[index])
        return flipped


def converted(form: str, seed: int, **options: Any) -> nn.Module:
    """Convert the network of a seed in one of the forms; made-up images are of Fashion-MNIST's size."""
    images = unlabeled(seed)
    return normswap.convert(original(seed), example_input=images[:2], **FORMS[form](images), **options)


def unlabeled(seed: int) -> Tensor:
    """Return 1,024 training images, other ones for each seed."""
    images = load()[0]
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:IMAGES]]


def distilled(seed: int) -> tuple[nn.Module, float]:
    """Convert and distill on 1,024 images, 128 of them to judge by; return the network and how many seconds it took.

    It is kept in WORK. The seconds are those that one core computes, others at work beside it or not.
    """
    folder = WORK / f"distilled-{seed}"
    took = folder / "seconds.txt"
    if not took.exists():
        learned, judged = unlabeled(seed).split((IMAGES - 128, 128))
        loader = DataLoader(Mirrored(learned), BATCH, shuffle=True, drop_last=True)
        model = original(seed)
        started = time.process_time()
        found = normswap.convert(model, example_input=learned[:2], groups=USUAL)
        normswap.calibrate(found, model, loader, steps=STEPS, held_back=judged.split(BATCH))
        seconds = time.process_time() - started
        normswap.save(found, folder)
        took.write_text(f"{seconds:.1f}", encoding="utf-8")
    return normswap.load(folder, model=original(seed)), float(took.read_text(encoding="utf-8"))


def measure(job: Job) -> Job:
    """Convert one network and return accuracies: in every way as the package does it, in few at another shrink."""
    seed, groups, shrink = job["seed"], job["groups"], job["shrink"]
    count = None if shrink is None else FEWER
    test = [part[:count] for part in load()[2:]]
    everything = groups == USUAL and shrink is None
    result = {"BN": accuracy(original(seed), *test)}
    for form in FORMS if everything else MATCHED:
        result[form] = accuracy(converted(form, seed, groups=groups, shrink=shrink), *test)
    if everything:
        model, seconds = distilled(seed)
        result |= {"seconds": seconds, "distilled": accuracy(model, *test)}
    return result


def jobs() -> Iterator[Job]:
    """Yield every seed and group count at its default shrink, and every shrink at the usual count."""
    wanted = [(groups, None) for groups in GROUPS] + [(USUAL, shrink) for shrink in SHRINKS]
    for seed, (groups, shrink) in product(range(3), wanted):
        yield {"groups": groups, "shrink": shrink, "seed": seed}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    run_all("function", measure, jobs(), workers=parser.parse_args().workers)
