"""Train from scratch at batch size 1 and 2: BatchNorm, GroupNorm, GroupNorm + Weight Standardization.

python benchmarks/scratch.py [--workers 2]      # resumable; the results go to docs/function.md by function_docs.py

A fresh benchmarks/fashion.py network on Fashion-MNIST, SGD with momentum 0.9 and a constant learning rate, no
augmentation; accuracy on the first 1,500 test images after the last step.
"""

import argparse
from collections.abc import Iterator
from itertools import product

import torch
import torch.nn.functional as F
from fashion import FashionResNet, accuracy, load
from records import Job, run_all

import normswap

FORMS = {"BN": None, "GN": {"ws": "none"}, "GN + WS": {"ws": "standard"}}
RATES, STEPS, TEST_IMAGES = (1e-3, 3e-3), 2000, 1500


def train(job: Job) -> Job:
    """Train one network and return its accuracy."""
    images, labels, test_images, test_labels = load()
    torch.manual_seed(job["seed"])
    options = FORMS[job["form"]]
    model = FashionResNet() if options is None else normswap.convert(FashionResNet(), **options)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], job["rate"], momentum=0.9)
    for _ in range(STEPS):
        model.train()
        rows = torch.randint(len(images), (job["batch"],))
        optimizer.zero_grad()
        F.cross_entropy(model(images[rows]), labels[rows]).backward()
        optimizer.step()
    return {"accuracy": round(accuracy(model, test_images[:TEST_IMAGES], test_labels[:TEST_IMAGES]), 2)}


def jobs() -> Iterator[Job]:
    """Yield every run."""
    for seed, batch, form, rate in product(range(3), (1, 2), FORMS, RATES):
        yield {"batch": batch, "form": form, "rate": rate, "seed": seed}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    run_all("scratch", train, jobs(), workers=parser.parse_args().workers)
