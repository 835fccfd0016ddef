"""Damage checkpoint files, seeded, and see what leaves the API: ``python tests/mutations.py 10000`` prints JSON.

The files of a checkpoint's folder are flipped, truncated and spliced, and so are state dicts in the three formats.
Sealed mutants are consistent lies: the configuration holds another value somewhere and every digest is right, so that
what lies behind the digest is reached, too.
"""

import hashlib
import json
import random
import resource
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

import normswap
from normswap.sources.state_dicts import read_state_dict

KINDS = ("model.safetensors", "config.json", "state.safetensors", "state.pth", "legacy.pth", "sealed")
VALUES = (
    None, True, 0, -1, 3, 2**31, 10**12, 10**40, 1e-300, 1e308, "", "x", "os:system", "\n", "a" * 20_000, [], [[]], {},
    {"tensor": [2, 3, 2**19, 2**19], "dtype": "float32"}, [10**9] * 8, "layer1.0.bn1", "../../etc/passwd",
)  # fmt: skip
HEADROOM = 2**29
"""Bytes of address space that the process may take beyond what it needed for the undamaged files."""


class Small(nn.Module):
    """A network of every kind of tensor a checkpoint holds: filters with gain and offset, norms, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        return self.fc(self.bn2(self.conv2(x)).relu().mean((2, 3)))


class Bench:
    """The undamaged files, and what a damaged copy of one leads to."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.folder = folder
        self.model = Small()
        self.converted = normswap.convert(self.model, example_input=torch.zeros(2, 3, 8, 8)).eval()
        normswap.save(self.converted, folder)
        self.state = normswap.load(folder, model=self.model).state_dict()
        self.plan = normswap.plan_of(self.converted)
        safetensors.torch.save_file(self.state, folder / "state.safetensors")
        torch.save(self.state, folder / "state.pth")
        torch.save(self.state, folder / "legacy.pth", _use_new_zipfile_serialization=False)
        self.files = {path.name: path.read_bytes() for path in folder.iterdir()}

    def outcome(self, kind: str, rng: random.Random) -> str:
        """Damage one file, use it, and put the undamaged one back."""
        try:
            if kind == "sealed":
                self.seal(rng)
            else:
                (self.folder / kind).write_bytes(damaged(self.files[kind], self.files, rng))
            return self.used(kind)
        finally:
            for name, content in self.files.items():
                (self.folder / name).write_bytes(content)

    def used(self, kind: str) -> str:
        try:
            if kind.startswith(("state", "legacy")):
                loaded = dict(read_state_dict(self.folder / kind))
            else:
                model = normswap.load(self.folder, model=self.model)
                if kind == "sealed":
                    normswap.check(model)
                    return "loads as it says"
                loaded = dict(model.state_dict())
                if normswap.plan_of(model) != self.plan:
                    return "silent"
        except normswap.NormswapError as error:
            return "named" if "\n" not in str(error) else "many lines"
        except Exception as error:
            return f"escaped {type(error).__name__}: {error}"
        return "identical" if self.same(loaded) else "silent"

    def same(self, loaded: dict[str, Tensor]) -> bool:
        return loaded.keys() == self.state.keys() and all(
            value.dtype == self.state[name].dtype and value.shape == self.state[name].shape
            and value.numpy().tobytes() == self.state[name].numpy().tobytes()
            for name, value in loaded.items()
        )  # fmt: skip

    def seal(self, rng: random.Random) -> None:
        config = json.loads(self.files["config.json"])
        change_a_value(config, rng)
        seal(self.folder, self.state, config)


def seal(folder: Path, state: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Write a configuration and tensors with every digest right, whatever the configuration says."""
    whole = isinstance(config.get("normswap"), dict)
    block = {key: value for key, value in config["normswap"].items() if key != "sha256"} if whole else {}
    rest = {key: value for key, value in config.items() if key != "normswap"}
    path = folder / "model.safetensors"
    metadata = {"format": "pt", "normswap": json.dumps(block), "timm": json.dumps(rest)}
    safetensors.torch.save_file(state, path, metadata=metadata)
    if whole:
        config["normswap"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "config.json").write_text(json.dumps(config))


def change_a_value(config: dict[str, Any], rng: random.Random) -> None:
    """Replace, remove or add one value somewhere in the configuration."""
    places = list(walk(config))
    holder, key = rng.choice(places)
    if rng.random() < 0.15:
        del holder[key]
    else:
        holder[key] = rng.choice(VALUES)


def walk(data: Any) -> Any:
    """Yield every place of JSON data as its container and its key."""
    for key in list(data) if isinstance(data, dict) else range(len(data)):
        yield data, key
        if isinstance(data[key], (dict, list)):
            yield from walk(data[key])


def damaged(content: bytes, others: dict[str, bytes], rng: random.Random) -> bytes:
    """Flip, cut or splice a file, mostly near its beginning and its end, where formats keep their structure."""

    def anywhere() -> int:
        end = len(content)
        return rng.choice([rng.randrange(end), rng.randrange(min(end, 512)), end - 1 - rng.randrange(min(end, 512))])

    def flip() -> bytes:
        data = bytearray(content)
        for _ in range(rng.choice([1, 1, 2, 8, 64])):
            data[anywhere()] ^= 1 << rng.randrange(8)
        return bytes(data)

    def cut() -> bytes:
        first = anywhere()
        return rng.choice([content[:first], content[first:], content[:first] + content[first + rng.randrange(1, 64) :]])

    def splice() -> bytes:
        other = others[rng.choice(sorted(others))]
        start, length = rng.randrange(len(other)), rng.randrange(1, 2048)
        piece = rng.choice([other[start : start + length], bytes(rng.randrange(1, 64)), rng.randbytes(16), b"[" * 9999])
        first = anywhere()
        return content[:first] + piece + content[first + rng.choice([0, len(piece)]) :]

    ways: list[Callable[[], bytes]] = [flip, cut, splice]
    return rng.choice(ways)()


def peak() -> int:
    """Return the largest resident size of the process so far, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def limit_memory() -> None:
    """Make every allocation fail that goes beyond what the process holds and `HEADROOM`."""
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + HEADROOM, resource.RLIM_INFINITY))


def run(count: int, seed: int = 0) -> dict[str, Any]:
    """Try `count` mutants and count their outcomes by kind of file."""
    warnings.simplefilter("ignore")  # what is said about prefixes and nesting
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for kind in KINDS[:-1]:
            if (found := bench.used(kind)) != "identical":
                raise AssertionError(f"the undamaged {kind}: {found}")
        normswap.check(normswap.load(folder, model=bench.model))
        before = peak()
        limit_memory()
        outcomes: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
        for number in range(count):
            kind = KINDS[number % len(KINDS)]
            outcomes[kind][bench.outcome(kind, random.Random(f"{seed}/{number}"))] += 1
    return {"mutants": count, "found": outcomes, "grown_mib": (peak() - before) / 1024}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(run(*map(int, sys.argv[1:]))))
