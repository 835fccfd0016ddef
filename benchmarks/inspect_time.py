"""Time `normswap.inspect` against `torch.fx.symbolic_trace`, network by network, in one run (A B A B).

python benchmarks/inspect_time.py [--every 1]

All networks are on the meta device, one thread. symbolic_trace only records the graph and fails on data-dependent
control flow; inspect also makes the plan.
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm
from zoos import build_on_meta, timm_zoo

import normswap
from normswap.networks.recognition import is_batch_norm

REPEATS = 2
RESULT = Path(__file__).parent / "results" / "inspect_time.json"


def seconds(function: Callable[[nn.Module], object], model: nn.Module) -> float | None:
    """Return how long a call takes, or None where it fails."""
    started = time.perf_counter()
    try:
        function(model)
    except Exception:
        return None
    return time.perf_counter() - started


def main() -> None:
    """Measure and print medians, 95th percentiles and the ratio with its spread."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="take every n-th network")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    ours: list[float] = []
    theirs: list[float] = []
    ratios: list[float] = []
    failures = networks = 0
    for _, build in tqdm(list(timm_zoo())[:: args.every], unit="net"):
        try:
            model = build_on_meta(build)
        except normswap.NormswapError:  # normswap's own entrypoint, which needs a checkpoint
            continue
        if not any(is_batch_norm(module) for module in model.modules()):
            continue
        networks += 1
        pairs = [(seconds(normswap.inspect, model), seconds(torch.fx.symbolic_trace, model)) for _ in range(REPEATS)]
        ours.append(min(a for a, _ in pairs if a is not None))
        traced = [b for _, b in pairs if b is not None]
        failures += not traced
        if traced:
            theirs.append(min(traced))
            ratios.append(ours[-1] / theirs[-1])
    low, middle, high = statistics.quantiles(ratios, n=4)
    result = {
        "networks": networks,
        "inspect": {"failed": 0, **_summary(ours)},
        "symbolic_trace": {"failed": failures, **_summary(theirs)},
        "ratio": {"median": round(middle, 2), "quartiles": [round(low, 2), round(high, 2)]},
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def _summary(values: list[float]) -> dict[str, float]:
    return {
        "median_s": round(statistics.median(values), 3),
        "p95_s": round(sorted(values)[int(0.95 * (len(values) - 1))], 3),
    }


if __name__ == "__main__":
    main()
