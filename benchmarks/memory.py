"""Measure how much memory every verb takes at most on a large network, as multiples of the network's size.

python benchmarks/memory.py                           # a network of 0.6 GB; minutes, and two times that on the disk
python benchmarks/memory.py regnety_1280 --folder .   # one of 2.6 GB

Each verb runs in a process of its own. Anonymous memory is what the machine must have; pages of mapped files, which
the peak of all resident memory counts, too, it takes back when it needs them. What converting a tiny network takes is
taken off.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from torch import nn

RESULTS = Path(__file__).parent / "results" / "memory.jsonl"
TINY, LARGE = "test_resnet", "regnety_320"
SIZES = "2,3,32,32"

OPENED = """
import torch, timm, normswap
from safetensors.torch import load_file
with torch.device("meta"):
    model = timm.create_model({name!r})
model.load_state_dict(load_file({weights!r}), assign=True)
"""
VERBS = {
    "convert": "convert {name} --weights {weights} -o {out} --input {sizes} --force -q",
    "convert --no-synthetic": "convert {name} --weights {weights} -o {out} --input {sizes} --force -q --no-synthetic",
    "check": "check {out} -q",
}
CODE = {
    "convert(inplace=True)": OPENED + "normswap.convert(model, inplace=True, example_input=torch.zeros({sizes}))",
    "convert(inplace=True), save": OPENED
    + "normswap.save(normswap.convert(model, inplace=True, example_input=torch.zeros({sizes})), {out!r})",
    "load": "import normswap; normswap.load({out!r})",
}


def trained(name: str, path: Path) -> int:
    """Write the weights of a random network that looks trained; return their size in bytes."""
    torch.manual_seed(0)
    model = timm.create_model(name)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    state = model.state_dict()
    save_file(state, path)
    return sum(tensor.nbytes for tensor in state.values())


def peaks(command: list[str]) -> tuple[int, int]:
    """Run a command; return the most anonymous and the most resident memory that it had, in bytes."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    anonymous = resident = 0
    while process.poll() is None:
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        except OSError:
            break
        found = {line.partition(":")[0]: line.split()[1] for line in lines if line.startswith(("RssAnon", "VmHWM"))}
        anonymous = max(anonymous, int(found.get("RssAnon", 0)))
        resident = max(resident, int(found.get("VmHWM", 0)))
        time.sleep(0.002)
    if process.wait():
        raise SystemExit(f"{' '.join(command)} failed")
    return anonymous << 10, resident << 10


def commands(name: str, folder: Path) -> dict[str, list[str]]:
    """Return a command for each verb, on the weights of a network in a folder."""
    weights, out = str(folder / f"{name}.safetensors"), str(folder / f"{name}-normswap")
    values = {"name": name, "weights": weights, "out": out, "sizes": SIZES}
    found = {verb: ["-m", "normswap", *text.format(**values).split()] for verb, text in VERBS.items()}
    found |= {verb: ["-c", text.format(**values)] for verb, text in CODE.items()}
    return {verb: [sys.executable, *command] for verb, command in found.items()}


def rows(name: str, folder: Path) -> Iterator[dict[str, object]]:
    """Yield a row for each verb."""
    trained(TINY, folder / f"{TINY}.safetensors")
    least = peaks(commands(TINY, folder)["convert"])
    size = trained(name, folder / f"{name}.safetensors")
    for verb, command in commands(name, folder).items():
        anonymous, resident = ((most - base) / size for most, base in zip(peaks(command), least, strict=True))
        yield {"network": name, "bytes": size, "verb": verb, "anonymous": anonymous, "resident": resident}


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", nargs="?", default=LARGE, help="name of a network of timm")
    parser.add_argument("--folder", type=Path, help="where to write weights and checkpoints")
    args = parser.parse_args()
    kept = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    kept = [line for line in kept if json.loads(line)["network"] != args.network]
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for row in rows(args.network, Path(folder)):
            print(f"{row['verb']:28} {row['anonymous']:5.2f} anonymous {row['resident']:5.2f} resident", flush=True)
            kept.append(json.dumps(row))
    RESULTS.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


if __name__ == "__main__":
    main()
