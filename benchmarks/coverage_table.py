"""Turn the results of the coverage sweeps into docs/coverage.md."""

import json
import statistics
from collections import Counter
from pathlib import Path

from records import RESULTS, read
from records import Job as Row

SUMS = ("norms", "left", "convs", "standardized", "activations", "lost_activations")

HEAD = """# Coverage

Every network with BatchNorm that these zoos can build, converted with default options. The table is written by
`python benchmarks/coverage.py --zoo ZOO`; one line per network is in `benchmarks/results`. "With data" are the networks
below 30 M parameters and 2 GFLOPs: their norms got random statistics, as if trained, and the same `check` as users get
ran on real tensors, the kernels were compared, and the state after saving and loading. Times of this sweep are of
cores on which the tests ran, too: two to four times those of idle ones.

"""


def write_table(target: Path) -> None:
    """Write the page from all result files."""
    zoos, packages = _results("coverage-"), _results("packages-")
    target.parent.mkdir(exist_ok=True)
    parts = [_totals(zoos), *_packages(packages), *_inspect_time(RESULTS / "inspect_time.json")]
    parts += [_details(zoo, rows) for zoo, rows in zoos.items()]
    target.write_text(HEAD + "\n\n".join(parts) + "\n")


PACKAGES = """## Other packages

`python benchmarks/coverage.py --zoo PACKAGE`: small networks of packages that are no zoos. "By hand": those for which
no input could be made up. The oracle is plain torch: with every new norm computing its old BatchNorm the network must
give the original's output to 1e-4. "Wrong" are those that do not; the other columns are what did not get as far, or
failed a check.

All rows are of one day's code; those of braindecode, kornia, monai, pytorchcv, transformers and tsai are of one state
of it, but for networks that were run again. transformers' `FastSpeech2ConformerModel`, which predicts how long its
speech is, had been refused for another length (CHANGELOG.md says what was changed). Its `UVDocModel` and pytorchcv's
`voca8flame`, `raft_things` and `lednet_cityscapes` had been built or called in ways in which they do not run, or on
maps of a single point. A network had 60 s of the processor; monai's `HighResNet` and `HoVerNet` needed more and had
300 s.

Of pytorchcv the list holds one small network of each of the 60 families that have the smallest ones. Of braindecode it
leaves out five that interpolate electrodes before another network of the list and hold no BatchNorm, and `REVE`, which
downloads where electrodes are.

deepinv's `UNet bias-free` is refused rightly: its norms divide by the deviation and subtract no mean. So is lightly's
`ResNetGenerator split norms`, of which each norm holds statistics of parts of the batch. torch_geometric's `XConv`
needs a library that is not on PyPI. spikingjelly's `ms_resnet18` in single step mode never ran: it makes its steps
itself.
"""

STATUSES = ("ok", "check fails", "wrong", "refused", "too slow", "not buildable", "does not run by itself")


def _packages(packages: dict[str, list[Row]]) -> list[str]:
    """Return a table of the packages and what became of the networks that were not converted, each with its reason."""
    if not packages:
        return []
    titles = ["package", "tried", "without BatchNorm", "by hand", *STATUSES]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    reasons = []
    for package, rows in packages.items():
        counts = Counter(row["status"] for row in rows)
        by_hand = sum(bool(row.get("by_hand")) for row in rows)
        cells = [package, len(rows), counts["no BatchNorm"], by_hand, *(counts[status] for status in STATUSES)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
        reasons += [
            f"- {package} `{row['model']}`, {row['status']}: {row.get('error', '')}"
            for row in rows
            if row["status"] not in ("ok", "no BatchNorm")
        ]
    return ["\n".join([PACKAGES, *lines, "", *reasons])]


def _inspect_time(path: Path) -> list[str]:
    """Return the comparison with symbolic_trace that benchmarks/inspect_time.py measured."""
    if not path.exists():
        return []
    found = json.loads(path.read_text())
    ours, theirs, ratio = found["inspect"], found["symbolic_trace"], found["ratio"]
    return [
        f"## Time to inspect\n\n`python benchmarks/inspect_time.py`: {found['networks']} timm networks on the meta "
        "device, one thread, the two tools in turn; inspect also makes the plan.\n\n"
        "| | median | 95th percentile | failed |\n|---|---|---|---|\n"
        f"| `normswap.inspect` | {ours['median_s']} s | {ours['p95_s']} s | {ours['failed']} |\n"
        f"| `torch.fx.symbolic_trace` | {theirs['median_s']} s | {theirs['p95_s']} s | {theirs['failed']} |\n\n"
        f"Ratio network by network: median {ratio['median']}, quartiles {ratio['quartiles']}."
    ]


def _results(kind: str) -> dict[str, list[Row]]:
    """Return the rows of all result files of a kind, by what their names say beside it."""
    return {path.stem.removeprefix(kind): read(path.stem) for path in sorted(RESULTS.glob(f"{kind}*.jsonl"))}


def _totals(zoos: dict[str, list[Row]]) -> str:
    lines = [
        "| zoo | networks with BatchNorm | converted, all checks hold | BN layers | left | convolutions | "
        "standardized | activations inside norms | lost | with data | inspect: median / p95 |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for zoo, rows in zoos.items():
        found = [row for row in rows if row.get("norms")]
        times = [row["inspect_s"] for row in found if "inspect_s" in row]
        cells = [
            zoo,
            len(found),
            sum(row["status"] == "ok" for row in found),
            *(sum(row.get(key, 0) for row in found) for key in SUMS),
            sum("checks" in row for row in found),
            f"{statistics.median(times):.2f} / {_p95(times):.2f} s",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _details(zoo: str, rows: list[Row]) -> str:
    found = [row for row in rows if row.get("norms")]
    parts = [f"## {zoo}", ""]
    failed = [row for row in found if row["status"] != "ok"]
    unbuilt = [row for row in rows if row["status"] == "not buildable"]
    bare = sum(row["status"] == "no BatchNorm" for row in rows)
    parts.append(
        f"{len(rows)} networks listed, {bare} without BatchNorm, {len(unbuilt)} that the zoo itself cannot build."
    )
    if failed:
        parts += ["", "Failed:", ""]
        parts += [
            f"- `{row['model']}`: {row.get('error') or '; '.join(row.get('failed_checks', []))}" for row in failed
        ]
    if unbuilt:
        parts += ["", "Not buildable:", "", *(f"- `{row['model']}`: {row['error']}" for row in unbuilt)]
    for title, counts in (
        ("Convolutions left plain", _counted(found, "plain")),
        ("Warnings, in networks", Counter(w for row in found for w in set(row.get("warnings", ())))),
        ("Group counts", _counted(found, "groups")),
    ):
        parts += ["", f"| {title} | |", "|---|---|", *(f"| {name} | {n} |" for name, n in counts.most_common(16))]
    skipped = Counter(name for row in found for name, ok in row.get("checks", {}).items() if ok is None)
    if skipped:
        parts += ["", "| Check that does not apply | networks |", "|---|---|"]
        parts += [f"| {name} | {n} |" for name, n in skipped.most_common()]
    return "\n".join(parts)


def _counted(rows: list[Row], key: str) -> Counter[str]:
    total: Counter[str] = Counter()
    for row in rows:
        total.update(row.get(key, {}))
    return total


def _p95(values: list[float]) -> float:
    return sorted(values)[int(0.95 * (len(values) - 1))]
