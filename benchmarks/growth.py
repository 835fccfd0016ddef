"""Measure how the time of every verb grows with the network; writes docs/growth.png.

python benchmarks/growth.py                # about ten minutes; name networks to measure some of them again
python benchmarks/growth.py --draw         # the picture alone, from the results there are

Seconds are of the processor, on one thread, so that what else a machine does counts little.
"""

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from records import RESULTS, read
from torch import Tensor, nn

import normswap

RESULT = RESULTS / "growth.jsonl"
PICTURE = Path(__file__).parent.parent / "docs" / "growth.png"
BLOCKS = (100, 400, 1600, 6400)
CONVS = 5_000
WIDTH, LAYERS = 2048, 53
"""Channels and 3x3 convolutions of a network of two billion parameters."""


class Block(nn.Module):
    """A residual block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Add to what comes in."""
        made: Tensor = x + torch.relu(self.norm(self.conv(x)))
        return made


def residual(blocks: int) -> nn.Module:
    """Return a residual network of tiny blocks that looks trained."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), *(Block(4) for _ in range(blocks)))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model


def chain(convs: int, channels: int, device: str = "cpu") -> nn.Module:
    """Return convolutions with norms one behind the other."""
    with torch.device(device):
        steps = [(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)) for _ in range(convs)]
        return nn.Sequential(*(layer for step in steps for layer in step))


def verbs(model: nn.Module, fresh: nn.Module, example: Tensor) -> Iterator[tuple[str, float]]:
    """Yield what each verb takes, in seconds."""
    _, taken = timed(lambda: normswap.inspect(model, example_input=example))
    yield "inspect", taken
    converted, taken = timed(lambda: normswap.convert(model, example_input=example))
    yield "convert", taken
    _, taken = timed(lambda: normswap.check(converted, example_input=example))
    yield "check", taken
    with tempfile.TemporaryDirectory() as folder:
        _, taken = timed(lambda: normswap.save(converted, folder))
        yield "save", taken
        _, taken = timed(lambda: normswap.load(folder, model=fresh))
        yield "load", taken


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """Return a result, and the processor's seconds that it took."""
    started = time.process_time()
    result = call()
    return result, time.process_time() - started


def residuals() -> Iterator[dict[str, Any]]:
    """Yield a row for each size of residual network and verb."""
    for blocks in BLOCKS:
        for verb, seconds in verbs(residual(blocks), residual(blocks), torch.zeros(2, 3, 8, 8)):
            yield {"size": blocks, "verb": verb, "seconds": seconds}


def chains() -> Iterator[dict[str, Any]]:
    """Yield a row for each verb on many small convolutions."""
    for verb, seconds in verbs(chain(CONVS, 4), chain(CONVS, 4), torch.zeros(2, 4, 8, 8)):
        yield {"size": CONVS, "verb": verb, "seconds": seconds}


def huge() -> Iterator[dict[str, Any]]:
    """Yield what it takes to inspect a network of two billion parameters without data."""
    model = chain(LAYERS, WIDTH, "meta")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    example = torch.empty(2, WIDTH, 8, 8, device="meta")
    _, seconds = timed(lambda: normswap.inspect(model, example_input=example))
    yield {"size": LAYERS, "parameters": parameters, "verb": "inspect", "seconds": seconds}


NETWORKS = {"meta": huge, "chain": chains, "residual": residuals}


def draw(rows: list[dict[str, Any]]) -> None:
    """Draw seconds over blocks, both in logarithms, with a line along which time grows as the network does."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    own = [row for row in rows if row["network"] == "residual"]
    for verb in dict.fromkeys(row["verb"] for row in own):
        points = [(row["size"], row["seconds"]) for row in own if row["verb"] == verb]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=verb)
    sizes = [BLOCKS[0], BLOCKS[-1]]
    start = min(row["seconds"] for row in own if row["size"] == sizes[0]) / 2
    axes.plot(sizes, [start * size / sizes[0] for size in sizes], "--", color="grey", label="as the network")
    axes.set(xscale="log", yscale="log", xlabel="residual blocks", ylabel="seconds on one thread")
    axes.set_xticks(BLOCKS, [f"{blocks:,}" for blocks in BLOCKS])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(PICTURE, dpi=130)


def main() -> None:
    """Measure and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), metavar="|".join(NETWORKS))
    parser.add_argument("--draw", action="store_true", help="draw what was measured before")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = read("growth")
    if not args.draw:
        dict(verbs(residual(4), residual(4), torch.zeros(2, 3, 8, 8)))  # what is imported late is imported now
        for name in args.networks:
            rows = [row for row in rows if row["network"] != name]
            for row in NETWORKS[name]():
                print(name, row, flush=True)
                rows.append({"network": name, **row})
                RESULT.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    draw(rows)


if __name__ == "__main__":
    main()
