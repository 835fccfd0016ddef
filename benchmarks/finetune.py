"""Fine-tune converted networks at small batches, near the task they know and far from it.

python benchmarks/finetune.py [--workers 2]     # resumable; the results go to docs/function.md by function_docs.py

Near: Fashion-MNIST itself. Far: the same images turned by 90° and inverted. SGD with momentum 0.9, constant learning
rate, no augmentation; accuracy on the first 3,000 test images at some steps. Needs benchmarks/fashion.py's networks.
"""

import argparse
from collections.abc import Callable, Iterator
from itertools import count, islice, product

import torch
import torch.nn.functional as F
from fashion import accuracy, load, original
from function import converted, distilled
from records import Job, run_all
from torch import Tensor, nn

from normswap.demo.comparison import far

RATES = {"near": (1e-4, 3e-4, 1e-3), "far": (5e-4, 1e-3, 2e-3)}
BATCHES = {"near": 2, "far": 1}
STEPS = {"near": (0, 100, 300), "far": (0, 400, 1200)}
TEST_IMAGES = 3000

FORMS: dict[str, Callable[[int], nn.Module]] = {
    "BN, batch statistics": original,
    "BN, frozen": original,
    "convert(model)": lambda seed: converted("convert(model)", seed),
}
OTHERS: dict[str, Callable[[int], nn.Module]] = {
    "convert(model), groups=8": lambda seed: converted("convert(model)", seed, groups=8),
    "convert(model), groups=auto": lambda seed: converted("convert(model)", seed, groups="auto"),
    "convert(model), shrink=1.5": lambda seed: converted("convert(model)", seed, shrink=1.5),
    "convert(model), ws=none": lambda seed: converted("convert(model)", seed, ws="none"),
    "not equalized": lambda seed: converted("not equalized", seed),
    "256 images": lambda seed: converted("256 images", seed),
    "distilled": lambda seed: distilled(seed)[0],
}
"""Of 32 groups where none are named."""


def steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    *,
    batch: int,
    seed: int,
    seen: Callable[[Tensor], Tensor] = lambda x: x,
) -> Iterator[int]:
    """Train without end on images drawn by a seed, and yield the number of each step."""
    generator = torch.Generator().manual_seed(seed)
    for step in count(1):
        rows = torch.randint(len(images), (batch,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(seen(images[rows])), labels[rows]).backward()
        optimizer.step()
        yield step


def tune(job: Job) -> Job:
    """Fine-tune one network and return its accuracies."""
    images, labels, test_images, test_labels = load()
    seen = far if job["task"] == "far" else lambda x: x
    test_images, test_labels = seen(test_images[:TEST_IMAGES]), test_labels[:TEST_IMAGES]
    model = (FORMS | OTHERS)[job["form"]](job["seed"])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], job["rate"], momentum=0.9)
    curve = [accuracy(model, test_images, test_labels)]
    stepping = steps(model, optimizer, images, labels, seen=seen, batch=job["batch"], seed=job["seed"])
    model.train(job["form"] != "BN, frozen")
    for step in islice(stepping, STEPS[job["task"]][-1]):
        if step in STEPS[job["task"]]:
            curve.append(accuracy(model, test_images, test_labels))
            model.train(job["form"] != "BN, frozen")
    return {"curve": [round(value, 2) for value in curve]}


def jobs() -> Iterator[Job]:
    """Yield every run: the default on three seeds, other forms on two."""
    for seeds, forms in ((3, FORMS), (2, OTHERS)):
        for seed, (task, batch), form in product(range(seeds), BATCHES.items(), forms):
            for rate in RATES[task]:
                yield {"task": task, "batch": batch, "form": form, "rate": rate, "seed": seed}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    run_all("finetune", tune, jobs(), workers=parser.parse_args().workers)
