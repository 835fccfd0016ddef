"""What group count, shrink and spread of the scales cost in fine-tuning: the demo's digits, near their task and far.

python benchmarks/spread.py [--workers 1]     # resumable; the table goes to docs/equalization.md

Near: the digits themselves, batch size 2, 150 steps. Far: turned by 90° and inverted, batch size 1, 400 steps. SGD with
momentum 0.9; test accuracy after the last step. A row takes a minute and a half on one core.
"""

import argparse
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from records import Job, run_all
from torch import nn

import normswap
from normswap.demo.comparison import accuracy, far
from normswap.demo.digits import digits_resnet, load_digits
from normswap.layers.equalization import equalize
from normswap.planning import equalizing

RATES = {"near": (3e-4, 1e-3, 3e-3), "far": (3e-4, 1e-3, 3e-3)}
STEPS, BATCH = {"near": 150, "far": 400}, {"near": 2, "far": 1}
SHRINKS = {1: (1.5, 10.0, 25.0, 60.0), 8: (1.5, 10.0, 25.0, 60.0), 32: (0.5, 4.0, 10.0, 25.0)}
BOUNDS, SEEDS = (0.0, 0.35, 3.0), range(3)
"""Other bounds than the one that ships."""


def converted(job: Job) -> nn.Module:
    """Return the digits' network in the form that a row is about."""
    model, (images, *_) = digits_resnet(), load_digits()
    if job["form"] != "converted":
        return model
    equalizing.equalize = partial(equalize, bound=job["bound"])  # type: ignore[assignment, attr-defined]
    options = {"groups": job["groups"], "shrink": job["shrink"], "equalize": job["bound"] is not None}
    return normswap.convert(model, **options, batches=images[:128].split(32))


def tune(job: Job) -> Job:
    """Fine-tune at every rate and return the accuracies, the one before first."""
    images, labels, test_images, test_labels = load_digits()
    start, rows = converted(job), {}
    rows["converted"] = accuracy(start.eval(), test_images, test_labels)
    state = {key: value.clone() for key, value in start.state_dict().items()}
    for task in RATES:
        see = far if task == "far" else (lambda x: x)
        for rate in RATES[task]:
            start.load_state_dict(state)
            optimizer = torch.optim.SGD([p for p in start.parameters() if p.requires_grad], rate, momentum=0.9)
            generator = torch.Generator().manual_seed(job["seed"])
            for _ in range(STEPS[task]):
                start.train(job["form"] != "frozen")
                chosen = torch.randint(len(images), (BATCH[task],), generator=generator)
                optimizer.zero_grad()
                F.cross_entropy(start(see(images[chosen])), labels[chosen]).backward()
                optimizer.step()
            rows[f"{task} {rate:g}"] = accuracy(start.eval(), see(test_images), test_labels)
    return {key: round(value, 2) for key, value in rows.items()}


def jobs() -> Iterator[Job]:
    """Yield every row: all shrinks and counts at the bound that ships, all bounds at some of them."""
    for seed in SEEDS:
        yield {"form": "batch statistics", "seed": seed}
        yield {"form": "frozen", "seed": seed}
        yield {"form": "converted", "groups": 32, "shrink": 0.5, "bound": None, "seed": seed}
        for groups, shrinks in SHRINKS.items():
            for shrink in shrinks:
                yield {"form": "converted", "groups": groups, "shrink": shrink, "bound": 0.7, "seed": seed}
        for bound in BOUNDS:
            yield {"form": "converted", "groups": 1, "shrink": 10.0, "bound": bound, "seed": seed}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, default=1)
    run_all("spread", tune, jobs(), workers=parser.parse_args().workers)
