"""Convert every BatchNorm network of a zoo, check each as users would, and write docs/coverage.md.

python benchmarks/coverage.py --zoo timm [--workers 2] [--resume] [--only 'resnet*']

Needs `pip install tqdm`, and for --zoo smp `pip install segmentation-models-pytorch`. Each network is converted on the
meta device, where shapes are compared; those below 30 M parameters and 2 GFLOPs also with data: their norms get random
statistics, as if trained, and the numbers are checked and compared after saving and loading. One JSON line per network
goes to benchmarks/results; nothing is filtered out.

--zoo may be another package of packages.py, too, whose small networks are held to plain torch (coverage_packages.py).
It must be installed (`pip install kornia monai …`); one process, a network at a time, a few minutes each.
"""

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
import warnings
from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from coverage_packages import line, sweep
from coverage_table import write_table
from packages import PACKAGES
from records import RESULTS
from torch import nn
from torch.nn.modules.conv import _ConvNd
from tqdm import tqdm
from zoos import ZOOS, build_on_meta

import normswap
from normswap.layers.convs import WeightStandardized
from normswap.layers.norms import GroupNormAct
from normswap.networks.network import Network
from normswap.networks.recognition import is_batch_norm
from normswap.tracing.forward import Trace, trace

MAX_PARAMETERS, MAX_FLOPS = 30e6, 2e9


def one(job: tuple[str, str]) -> dict[str, Any]:
    """Convert one network and return what happened; errors are results too."""
    zoo, name = job
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    row: dict[str, Any] = {"model": name}
    try:
        build = dict(ZOOS[zoo]())[name]
        try:
            model = build_on_meta(build)
        except Exception as error:
            return {**row, "status": "not buildable", "error": line(error)}
        row["norms"] = sum(is_batch_norm(module) for module in model.modules())
        if not row["norms"]:
            return {**row, "status": "no BatchNorm"}
        row |= structure(model)
        if row["parameters"] < MAX_PARAMETERS and row["flops"] < MAX_FLOPS:
            row |= numbers(build())
        row["status"] = "failed" if row["left"] or row["lost_activations"] or row.get("failed_checks") else "ok"
    except Exception as error:
        row |= {"status": "failed", "error": line(error)}
    row["megabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return row


def structure(model: nn.Module) -> dict[str, Any]:
    """Convert without data and compare structure."""
    started = time.perf_counter()
    plan = normswap.inspect(model)
    inspected = time.perf_counter() - started
    started = time.perf_counter()
    converted = normswap.convert(model)
    left = sum(is_batch_norm(module) for module in converted.modules())
    before, after = carried(model), carried(converted)
    return {
        "inspect_s": round(inspected, 4),
        "convert_s": round(time.perf_counter() - started, 4),
        "parameters": sum(p.numel() for p in model.parameters()),
        "flops": flops(model, trace(Network(model))),
        "converted": sum(isinstance(module, nn.GroupNorm) for module in converted.modules())
        - sum(isinstance(module, nn.GroupNorm) for module in model.modules()),
        "convs": len(plan.convs),
        "standardized": sum(entry.changes for entry in plan.convs),
        "left": left,
        "activations": sum(before.values()),
        "lost_activations": sum((before - after).values()),
        "plain": dict(Counter(general(entry) for entry in plan.convs if not entry.changes)),
        "groups": dict(Counter(str(entry.groups) for entry in plan.norms)),
        "one_channel": sum(entry.groups == entry.channels > 1 for entry in plan.norms),
        "warnings": [kind(warning) for warning in plan.warnings],
    }


def numbers(model: nn.Module) -> dict[str, Any]:
    """Convert with data, as if trained: checks, kernels kept, equality after save and load."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if is_batch_norm(module) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.1, generator=generator)  # type: ignore[union-attr, operator]
            module.running_var.uniform_(0.5, 1.5, generator=generator)  # type: ignore[union-attr, operator]
    model.eval()
    started = time.perf_counter()
    converted = normswap.convert(model)
    checks = normswap.check(converted, model)
    originals, scales = dict(model.named_modules()), normswap.plan_of(converted).scales
    standardized = [(n, m) for n, m in converted.named_modules() if isinstance(m, WeightStandardized)]
    drift = max((moved(module, originals[name], scales.get(name)) for name, module in standardized), default=0.0)
    with tempfile.TemporaryDirectory() as folder:
        normswap.save(converted, folder, source=None)
        loaded = normswap.load(folder, model=model)
    states = zip(converted.state_dict().values(), loaded.state_dict().values(), strict=True)
    same = all(torch.equal(ours, theirs) for ours, theirs in states)
    failed = [f"{row.name}: {row.detail}" for row in checks.failed]
    failed += [] if same else ["reload: the state differs"]
    failed += [] if drift <= 1e-6 else [f"kernels: moved by {drift:.1e}"]
    return {
        "checks": {row.name: row.ok for row in checks.rows},
        "failed_checks": failed,
        "kernel_drift": drift,
        "check_s": round(time.perf_counter() - started, 2),
    }


def moved(standardized: WeightStandardized, original: nn.Module, scale: tuple[float, ...] | None) -> float:
    """Return how far a kernel is from the pretrained one times its scales, relative to its largest weight."""
    weight: torch.Tensor = original.weight  # type: ignore[assignment]
    if scale is not None:
        axis = int(getattr(original, "transposed", False) and original.groups == 1)
        weight = weight * weight.new_tensor(scale).view(-1, *(1 for _ in weight.shape[axis + 1 :]))
    return float((standardized.standardized_weight() - weight).abs().max() / weight.abs().max())


def carried(model: nn.Module) -> Counter[str]:
    """Count the modules that norms run after normalizing, by class, identities left out."""
    return Counter(
        type(child).__name__
        for norm in model.modules()
        if is_batch_norm(norm) or isinstance(norm, GroupNormAct)
        for child in norm.children()
        if not isinstance(child, nn.Identity)
    )


def flops(model: nn.Module, found: Trace) -> int:
    """Multiply-adds of convolutions and linear layers for one sample."""
    total = 0
    for name, module in model.named_modules():
        if isinstance(module, (_ConvNd, nn.Linear)) and found.shapes.get(name):
            shape = found.shapes[name][0]
            outputs = torch.Size(shape[1:]).numel()
            total += outputs * (module.weight.numel() // module.weight.shape[0])
    return total


def general(entry: normswap.ConvEntry) -> str:
    """Return a reason without the names of layers, so that reasons add up."""
    reason = entry.reason
    for name in sorted(entry.feeds, key=len, reverse=True):
        reason = reason if name.startswith("<") or not name else reason.replace(name, "a layer")
    return reason


def kind(warning: str) -> str:
    """Return a warning without counts and names."""
    for part in (
        "flattened batch",
        "never reached",
        "fold BatchNorm",
        "calls batch_norm itself",
        "forward pass stopped",
    ):
        if part in warning:
            return part
    return warning


def main() -> None:
    """Run the sweep and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", choices=[*ZOOS, *PACKAGES], required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--resume", action="store_true", help="keep the results of an interrupted sweep")
    parser.add_argument("--only", default="*", help="glob of model names")
    args = parser.parse_args()
    path = RESULTS / f"coverage-{args.zoo}.jsonl"
    path.parent.mkdir(exist_ok=True)
    table = Path(__file__).parent.parent / "docs" / "coverage.md"
    if args.zoo in PACKAGES:
        sweep(args.zoo, RESULTS / f"packages-{args.zoo}.jsonl", args.only)
        write_table(table)
        return
    rows = [json.loads(line) for line in path.read_text().splitlines()] if args.resume and path.exists() else []
    done = {row["model"] for row in rows}
    jobs = [(args.zoo, name) for name, _ in ZOOS[args.zoo]() if name not in done and fnmatchcase(name, args.only)]
    started = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    with context.Pool(args.workers, maxtasksperchild=40) as pool, path.open("a" if rows else "w") as file:
        for row in tqdm(pool.imap_unordered(one, jobs), total=len(jobs), unit="net"):
            file.write(json.dumps(row) + "\n")
            file.flush()
            if row["status"] == "failed":
                tqdm.write(f"{row['model']}: {row.get('error') or row.get('failed_checks') or row}")
    print(f"{len(jobs)} networks in {(time.perf_counter() - started) / 60:.1f} minutes")
    write_table(table)


if __name__ == "__main__":
    main()
