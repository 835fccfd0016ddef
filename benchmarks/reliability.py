"""Run everything that docs/reliability.md counts, and write its table: ``python benchmarks/reliability.py``.

Inputs, properties and numerics are pytest cases; damaged files and killed processes are counted by their own scripts.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SUMMED = ("model.safetensors", "config.json", "state.pth")
"""Damaged files whose every byte a digest or a checksum covers."""
SUITES = {
    "bad inputs, through the CLI and the API": "test_bad_*.py",
    "hostile files": "test_attacks.py",
    "writes: races, links, permissions": "checkpoint/test_atomic.py",
    "numerics, against float64": "test_numerics.py",
}
BATCH = 1000
"""Mutants that one process tries."""
NETWORKS = 250
"""Networks that one process draws from the grammar."""
FIRST_SEED = 101
Row = tuple[str, str, str]

PAGE = """# Reliability

What was tried to make normswap fail silently, crash, or lose a checkpoint, and how often it did. Made by
`python benchmarks/reliability.py`.

| what | tried | found |
|---|---|---|
{rows}

A network is drawn from the grammar of `tests/grammar.py`: kinds of convolutions and norms, branches, ties, readers,
norms that compute something else, code that counts outside, names with escape sequences, depth. What plain float64
torch says of it must hold: norms do what BatchNorm did where statistics are the running ones, what must stay plain
stays, sizes of filters change nothing, training agrees with and without `accumulate`, masks and files keep what is
computed, and the source and the world are as before. Each rule keeps a fault of one of fourteen kinds out; without it
one of these networks must fail.

A mutant is a checkpoint file that was flipped, truncated or spliced at random, seeded. *Named* means that an error of
normswap, of one line, left the API; *identical* that the network or the tensors are those of the undamaged file, bit
for bit; *silent* that they are others and nothing was said. Sealed mutants are consistent lies: a value in the
configuration is another and every digest is right. They are named, or describe a network and load as it. A safetensors
file of somebody else, and torch's format before 1.6, hold no checksum: a flipped weight in them is another weight, and
nobody can tell.

A kill point is one call, or one system call where `strace` can count them, before which the process is killed, without
any clean-up; or a file size at which the kernel kills it while it writes. After each, `load` must give the old network
or the new one with its own configuration and card, and the next `save` must leave nothing else in the folder.
"""


def pytest_cases(pattern: str, *options: str, environment: dict[str, str] | None = None) -> tuple[Counter[str], str]:
    """Run the test files that match, and return how their cases ended and what pytest printed."""
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob(pattern))
    if not files:
        return Counter(), ""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", f"--junitxml={report}"]
        result = subprocess.run(
            [*command, "--timeout=3600", *options, *files],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
        )
        if not report.exists():
            raise SystemExit(result.stdout + result.stderr)
        cases = ElementTree.parse(report).getroot().iter("testcase")
        found = Counter(next((child.tag for child in case if child.tag in ENDS), "passed") for case in cases)
    return found, result.stdout


ENDS = ("failure", "error", "skipped")


def suite(title: str, pattern: str) -> Row:
    found, _ = pytest_cases(pattern)
    if not found:
        return title, "not run", f"no {pattern} here"
    return title, f"{found.total():,} cases", ended(found)


def ended(found: Counter[str]) -> str:
    words = {"passed": "as expected", "failure": "failed", "error": "errors", "skipped": "skipped"}
    return ", ".join(f"{found[key]:,} {word}" for key, word in words.items() if found[key] or key == "passed")


def properties(profile: str) -> Row:
    """Run the properties and add up the examples that hypothesis reports."""
    found, printed = pytest_cases(
        "test_properties.py", "--hypothesis-show-statistics", environment={"HYPOTHESIS_PROFILE": profile}
    )
    if not found:
        return "properties", "not run", "no test_properties.py here"
    passing, failing, invalid = (
        sum(int(number) for number in re.findall(rf"(\d+) {kind}\b", printed))
        for kind in ("passing", "failing", "invalid")
    )
    tried = f"{found.total():,} cases, {passing + failing:,} examples"
    return "properties", tried, f"{ended(found)}; {failing:,} failing examples, {invalid:,} invalid and not counted"


def script(name: str, *arguments: str) -> Any:
    """Return what a script in tests/ prints; None where its process crashed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / name), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode < 0:
        return None
    if result.returncode:
        raise SystemExit(result.stderr)
    return json.loads(result.stdout)


def mutants(count: int) -> list[Row]:
    batches = [script("mutations.py", str(min(BATCH, count - start)), str(start)) for start in range(0, count, BATCH)]
    finished = [batch for batch in batches if batch is not None]
    outcomes: dict[str, Counter[str]] = defaultdict(Counter)
    for batch in finished:
        for kind, found in batch["found"].items():
            outcomes[kind].update(found)
    rows = []
    for kind, found in outcomes.items():
        known = ("named", "identical", "loads as it says", "silent")
        other = sum(number for outcome, number in found.items() if outcome not in known)
        words = [f"{found[outcome]:,} {outcome}" for outcome in known if outcome in found]
        note = " (no checksum)" if "silent" in found and kind not in SUMMED else ""
        rows.append((f"mutants of {kind}", f"{sum(found.values()):,}", f"{', '.join(words)}{note}, {other:,} others"))
    escaped = sum(n for f in outcomes.values() for key, n in f.items() if key.startswith(("escaped", "many")))
    silent = sum(outcomes[kind]["silent"] for kind in SUMMED)
    crashes, grown = len(batches) - len(finished), max(batch["grown_mib"] for batch in finished)
    said = f"{escaped:,} undocumented errors, {crashes} crashes, {silent:,} silent where a checksum exists; "
    tried = sum(batch["mutants"] for batch in finished)
    return [*rows, ("mutants in all", f"{tried:,}", f"{said}memory grew by {grown:.0f} MiB")]


def networks(count: int) -> list[Row]:
    """Draw networks from the grammar, and take its rules away one by one."""
    command = [sys.executable, str(ROOT / "benchmarks" / "grammar.py")]
    seeds = range(FIRST_SEED, FIRST_SEED + count // NETWORKS)
    drawn = [
        subprocess.run([*command, f"--networks={NETWORKS}", f"--seed={seed}"], capture_output=True) for seed in seeds
    ]
    differ = sum(result.returncode != 0 for result in drawn)
    tried = f"{NETWORKS * len(drawn):,} networks, {len(drawn)} seeds"
    rules = subprocess.run([*command, "--mutants"], capture_output=True, text=True).stdout.splitlines()[1:]
    seen = sum("NOT SEEN" not in line for line in rules)
    return [
        ("networks from a grammar", tried, f"{differ} of the seeds showed a difference"),
        ("rules taken away", f"{len(rules)} rules", f"{seen} noticed, {len(rules) - seen} not"),
    ]


def kills() -> list[Row]:
    rows, names = [], {"calls": "calls", "sizes": "file sizes", "syscalls": "system calls"}
    totals: Counter[str] = Counter()
    for row in script("killing.py") or ():
        survived = row.get("old", 0) + row["new"]
        totals.update(tried=row["killed"], survived=survived)
        found = f"{row.get('old', 0)} old, {row['new']} new, whole"
        rows.append((f"killed at {names[row['kind']]}: {row['scenario']}", f"{row['killed']} kills", found))
    lost = totals["tried"] - totals["survived"]
    rows.append(("kills in all", f"{totals['tried']} kills", f"{totals['survived']} survived, {lost} lost checkpoints"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutants", type=int, default=10_000)
    parser.add_argument("--networks", type=int, default=2000)
    parser.add_argument("--profile", default="thorough", help="hypothesis profile of tests/test_properties.py")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "reliability.md")
    chosen = parser.parse_args()
    rows = [*(suite(*item) for item in SUITES.items()), properties(chosen.profile), *networks(chosen.networks)]
    rows += [*mutants(chosen.mutants), *kills()]
    text = "\n".join(f"| {what} | {tried} | {found} |" for what, tried, found in rows)
    chosen.output.write_text(PAGE.format(rows=text), encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
