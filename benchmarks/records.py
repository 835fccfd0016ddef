"""Run jobs in several processes and keep each result as one JSON line, so that a benchmark can be resumed."""

import json
import multiprocessing
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from tqdm import tqdm

RESULTS = Path(__file__).parent / "results"
Job = dict[str, Any]


def run_all(name: str, function: Callable[[Job], Job], jobs: Iterable[Job], *, workers: int) -> list[Job]:
    """Return every job with its result; those that the results file holds already are not run again."""
    path = RESULTS / f"{name}.jsonl"
    rows = read(name)
    jobs = list(jobs)
    missing = [job for job in jobs if not any(job.items() <= row.items() for row in rows)]
    with multiprocessing.get_context("spawn").Pool(workers, torch.set_num_threads, (1,)) as pool:
        pairs = pool.imap_unordered(_Runner(function), missing)
        for job, result in tqdm(pairs, name, total=len(missing), unit="run"):
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**job, **result}) + "\n")
    return read(name)


class _Runner:
    def __init__(self, function: Callable[[Job], Job]) -> None:
        self.function = function

    def __call__(self, job: Job) -> tuple[Job, Job]:
        return job, self.function(job)


def read(name: str) -> list[Job]:
    """Return the results kept so far."""
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def spread(values: Iterable[float]) -> str:
    """Return mean ± standard deviation over seeds, or a dash where nothing was measured."""
    found = list(values)
    if not found:
        return "–"
    return f"{mean(found):.1f} ± {stdev(found):.1f}" if len(found) > 1 else f"{mean(found):.1f}"
