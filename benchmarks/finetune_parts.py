"""Tune parts of Fashion-MNIST networks at a high rate: what of a network it is that forgets.

python benchmarks/finetune_parts.py [--workers 2]     # resumable; about three minutes on one core; prints the table

Near the trained task, batch size 2, 100 steps of SGD with momentum 0.9 at 1e-3; accuracy on the first 3,000 test
images. Needs benchmarks/fashion.py's networks.
"""

import argparse
from itertools import islice, product

import torch
from fashion import accuracy, load, original
from finetune import TEST_IMAGES, steps
from function import converted
from records import Job, run_all, spread
from torch import nn

RATE, BATCH, STEPS, SEEDS = 1e-3, 2, 100, 3
FORMS = {
    "BN, batch statistics": original,
    "convert(model)": lambda seed: converted("convert(model)", seed),
    "convert(model), groups=8": lambda seed: converted("convert(model)", seed, groups=8),
}
RATES = {
    "all": (RATE, RATE),
    "filters alone": (RATE, 0.0),
    "all but filters": (0.0, RATE),
    "filters at a tenth": (RATE / 10, RATE),
}
"""Of the convolutions' filters, and of the norms and the head."""


def tune(job: Job) -> Job:
    """Fine-tune parts of one network and return its accuracy."""
    images, labels, test_images, test_labels = load()
    model = FORMS[job["form"]](job["seed"])
    filters = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    held = {id(weight) for weight in filters}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in held]
    groups = [{"params": part, "lr": rate} for part, rate in zip((filters, others), RATES[job["part"]], strict=True)]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    model.train()
    for _ in islice(steps(model, optimizer, images, labels, batch=BATCH, seed=job["seed"]), STEPS):
        pass
    return {"accuracy": round(accuracy(model, test_images[:TEST_IMAGES], test_labels[:TEST_IMAGES]), 2)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    jobs = [{"form": form, "part": part, "seed": seed} for seed, form, part in product(range(SEEDS), FORMS, RATES)]
    rows = run_all("finetune_parts", tune, jobs, workers=parser.parse_args().workers)
    print("| | " + " | ".join(RATES) + " |", "|---" * (len(RATES) + 1) + "|", sep="\n")
    for form in FORMS:
        found = [[r["accuracy"] for r in rows if (r["form"], r["part"]) == (form, part)] for part in RATES]
        print(f"| {form} | " + " | ".join(map(spread, found)) + " |")
