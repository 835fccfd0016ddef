"""Networks that are large for what they compute, and how much memory the command line takes to convert one.

``python tests/large.py WEIGHTS OUT`` writes the weights of the large one, converts it and prints, as JSON, its size and
the most anonymous memory that this took, in bytes. What a small one takes first, for what is imported late, is no part.
"""

import json
import sys
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

SIZES = "2,{},4,4"


def network(channels: int) -> nn.Module:
    """Return convolutions and norms, all of whose values are a state dict's to give."""
    torch.manual_seed(0)
    steps = ((nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()) for _ in range(12))
    return nn.Sequential(*(layer for step in steps for layer in step))


def small() -> nn.Module:
    """Return a network of 30 kB."""
    return network(16)


def large() -> nn.Module:
    """Return a network of 113 MB."""
    return network(512)


def write_trained(model: nn.Module, path: Path) -> int:
    """Write the state of a network that looks trained; return its size in bytes."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
    state = model.state_dict()
    save_file(state, path)
    return sum(tensor.nbytes for tensor in state.values())


def anonymous() -> int:
    """Return the anonymous memory of this process, in bytes: what no file holds."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) << 10


def convert(factory: str, channels: int, weights: str, out: str) -> None:
    """Run the verb."""
    from normswap.cli.app import cli

    where = ["--weights", weights, "-o", out, "--input", SIZES.format(channels), "-q"]
    code = cli(["convert", f"large:{factory}", *where], standalone_mode=False)
    if code:
        raise SystemExit(code)


def main() -> None:
    """Convert both networks, the large one watched."""
    weights, out = sys.argv[1:]
    torch.set_num_threads(1)
    write_trained(small(), Path(f"{weights}.small"))
    size = write_trained(large(), Path(weights))
    convert("small", 16, f"{weights}.small", f"{out}-small")
    before, most, done = anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, anonymous())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    convert("large", 512, weights, out)
    done.set()
    watcher.join()
    print(json.dumps({"size": size, "anonymous": most - before}))


if __name__ == "__main__":
    main()
