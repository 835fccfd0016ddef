"""Fine-tune converted networks at small batches, near the task they know and far from it.

python benchmarks/finetune.py [--workers 2]     # resumable; the results go to docs/function.md by function_docs.py

Near: Fashion-MNIST itself. Far: the same images turned by 90° and inverted. SGD with momentum 0.9, constant learning
rate, no augmentation; accuracy on the first 1,500 test images at some steps. Needs benchmarks/fashion.py's networks.
"""

import argparse
from collections.abc import Callable, Iterator
from itertools import product

import torch
import torch.nn.functional as F
from fashion import WORK, accuracy, load, original
from function import distilled
from records import Job, run_all
from torch import Tensor, nn

import normswap

RATES = {"near": (1e-4, 3e-4, 1e-3), "far": (5e-4, 1e-3, 2e-3)}
STEPS = {"near": (0, 100, 300, 800), "far": (0, 100, 400, 1200)}
TEST_IMAGES = 1500


def calibrated(model: nn.Module, seed: int) -> nn.Module:
    """Return the converted network after function.py's distillation, made once a seed."""
    path = WORK / f"distilled-{seed}.pt"
    if not path.exists():
        torch.save(distilled(model, seed).state_dict(), path)
    converted = normswap.convert(model)
    converted.load_state_dict(torch.load(path, weights_only=True))
    return converted


FORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "BN, batch statistics": lambda model: model,
    "BN, frozen": lambda model: model,
    "copied + standard WS": lambda model: normswap.convert(model, affine="copy", ws="standard"),
    "normswap": normswap.convert,
    "normswap, calibrated": normswap.convert,
}
OTHERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "normswap, shrink=0": lambda model: normswap.convert(model, shrink=0),
    "normswap, groups=auto": lambda model: normswap.convert(model, groups="auto"),
    "normswap, no WS": lambda model: normswap.convert(model, ws="none"),
    "normswap, standard WS": lambda model: normswap.convert(model, ws="standard"),
    "normswap, offset decayed": lambda model: normswap.convert(model),
    "normswap, offset learned at 1 %": lambda model: normswap.convert(model),
}


def turned(images: Tensor) -> Tensor:
    """Return images turned by 90° and inverted."""
    return -torch.rot90(images, 1, (2, 3))


def tune(job: Job) -> Job:
    """Fine-tune one network and return its accuracies."""
    images, labels, test_images, test_labels = load()
    seen = turned if job["task"] == "far" else lambda x: x
    test_images, test_labels = seen(test_images[:TEST_IMAGES]), test_labels[:TEST_IMAGES]
    model = (FORMS | OTHERS)[job["form"]](original(job["seed"]))
    if job["form"] == "normswap, calibrated":
        model = calibrated(original(job["seed"]), job["seed"])
    generator = torch.Generator().manual_seed(job["seed"])
    optimizer = torch.optim.SGD(groups(model, job["form"], job["rate"]), job["rate"], momentum=0.9)
    offsets = [p for name, p in model.named_buffers() if name.endswith("ws_offset")]
    curve = [accuracy(model, test_images, test_labels)]
    for step in range(1, STEPS[job["task"]][-1] + 1):
        model.train(job["form"] != "BN, frozen")
        rows = torch.randint(len(images), (job["batch"],), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(seen(images[rows])), labels[rows]).backward()
        optimizer.step()
        if job["form"] == "normswap, offset decayed":
            with torch.no_grad():
                torch._foreach_mul_(offsets, 0.99)
        if step in STEPS[job["task"]]:
            curve.append(accuracy(model, test_images, test_labels))
    return {"curve": [round(value, 2) for value in curve]}


def groups(model: nn.Module, form: str, rate: float) -> list[dict[str, object]]:
    """Return parameter groups: everything trainable, and the offsets apart where a form learns them."""
    chosen: list[dict[str, object]] = [{"params": [p for p in model.parameters() if p.requires_grad]}]
    if form == "normswap, offset learned at 1 %":
        offsets = [p.requires_grad_() for name, p in model.named_buffers() if name.endswith("ws_offset")]
        chosen.append({"params": offsets, "lr": rate / 100})
    return chosen


def jobs() -> Iterator[Job]:
    """Yield every run: the grid on three seeds, other forms at one rate, other batch sizes on one seed."""
    grids = [
        ("near", 2, FORMS, slice(3), (1, 2, 0)),
        ("far", 1, FORMS, slice(3), (1, 2, 0)),
        ("near", 2, OTHERS, slice(1, 2), (1, 2)),
        ("far", 1, OTHERS, slice(1), (1, 2)),
        ("near", 1, FORMS, slice(3), (1,)),
        ("near", 4, FORMS, slice(3), (1,)),
    ]
    for task, batch, forms, rates, seeds in grids:
        for seed, form, rate in product(seeds, forms, RATES[task][rates]):
            yield {"task": task, "batch": batch, "form": form, "rate": rate, "seed": seed}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    run_all("finetune", tune, jobs(), workers=parser.parse_args().workers)
