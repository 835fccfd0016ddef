"""Time variants side by side: A B A B, ratios round by round."""

from collections.abc import Callable, Mapping
from statistics import median, quantiles
from typing import Any

import torch
from torch.utils.benchmark import timer

Variant = Callable[[], Any]


def interleaved(
    variants: Mapping[str, Variant], *, rounds: int, clock: Callable[[], float] = timer
) -> dict[str, list[float]]:
    """Return seconds per call for every variant, measured in turns; one more round before them warms up.

    Args:
        variants: What to call, by name.
        rounds: Turns that count.
        clock: torch's timer, which waits for a GPU; ``time.process_time`` on one thread of a busy machine.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, run in variants.items():
            start = clock()
            run()
            taken = clock() - start
            if turn:
                seconds[name].append(taken)
    return seconds


def ratio(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Return the median of the ratios of the rounds and their quartiles."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    low, _, high = quantiles(ratios, n=4)
    return {"ratio": median(ratios), "low": low, "high": high}


def summary(seconds: dict[str, list[float]], base: str) -> dict[str, dict[str, float]]:
    """Return milliseconds and the ratio to `base` for every variant."""
    return {name: {"ms": 1e3 * median(found), **ratio(found, seconds[base])} for name, found in seconds.items()}


def device() -> torch.device:
    """Return the GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name() -> str:
    """Return what the figures were measured on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"


def spread(row: Mapping[str, float]) -> str:
    """Return a ratio with its quartiles."""
    return f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
