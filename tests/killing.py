"""Kill a process at every call with which `save` and the recovery in `load` change the disk, and look at what is left.

``python tests/killing.py`` prints how many points were tried and how many checkpoints were lost, as JSON.
"""

import fcntl
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

import normswap
from normswap.checkpoint.card import model_card

CALLS = ("open", "replace", "fsync", "chmod", "unlink", "mkdir", "rmdir", "close")
SYSCALLS = (
    "openat write pwrite64 writev rename renameat renameat2 linkat fsync fdatasync chmod fchmod fchmodat ftruncate "
    "unlink unlinkat mkdir rmdir flock"
).split()


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16))


def converted(groups: int) -> nn.Module:
    torch.manual_seed(groups)
    return normswap.convert(network(), groups=groups, example_input=torch.zeros(2, 3, 12, 12))


MODELS = {groups: converted(groups) for groups in (2, 4, 8)}


def write_often(folder: Path, groups: int) -> None:
    """Save one network again and again; run in a process of its own."""
    for _ in range(12):
        normswap.save(MODELS[groups], folder)


def generation(folder: Path) -> int:
    """Return which of the networks a folder holds, whole: tensors, plan and card."""
    model = normswap.load(folder, model=network())
    (groups,) = {entry.groups for entry in normswap.plan_of(model).norms}
    expected = MODELS[groups].state_dict()  # type: ignore[index]
    if not all(torch.equal(value, expected[name]) for name, value in model.state_dict().items()):
        raise AssertionError("tensors of another checkpoint")
    if (folder / "README.md").read_text() != model_card(json.loads((folder / "config.json").read_text())):
        raise AssertionError("the card of another checkpoint")
    return groups  # type: ignore[return-value]


class Killer:
    """Counts the calls that change the disk and ends the process, without any clean-up, at one of them."""

    def __init__(self, point: int) -> None:
        self.left = point

    def tick(self) -> None:
        self.left -= 1
        if self.left < 0:
            os._exit(9)

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            return function(*args, **kwargs)

        return wrapped

    def halfway(self, function: Callable[..., Any], path_of: Callable[..., Path]) -> Callable[..., Any]:
        """Wrap a function that writes a whole file; killed in the middle it leaves half of the file."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            result = function(*args, **kwargs)
            path = path_of(*args)
            if self.left == 0:
                os.truncate(path, path.stat().st_size // 2)
            self.tick()
            return result

        return wrapped

    def install(self) -> None:
        for name in CALLS:
            setattr(os, name, self.around(getattr(os, name)))
        fcntl.flock = self.around(fcntl.flock)
        io.open = self.around(io.open)  # type: ignore[assignment]
        save_file = safetensors.torch.save_file
        safetensors.torch.save_file = self.halfway(save_file, lambda tensors, path: Path(path))
        Path.write_text = self.halfway(Path.write_text, lambda path, text: path)  # type: ignore[method-assign]


def in_child(action: Callable[[], object], prepare: Callable[[], object], trace: str | None = None) -> bool:
    """Run an action in a child process; tell whether it got to its end rather than being killed."""
    child = os.fork()
    if child == 0:
        try:
            if trace is not None:
                os.kill(os.getpid(), signal.SIGSTOP)
            prepare()
            action()
            os._exit(0)
        except BaseException as error:
            print(f"the child failed: {error!r}", file=sys.stderr)
            os._exit(1)
    tracer = _attached(child, trace) if trace is not None else None
    _, status = os.waitpid(child, 0)
    if tracer is not None:
        tracer.wait()
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 1:
        raise AssertionError("the child failed instead of being killed")
    return os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0


def _attached(child: int, trace: str) -> "subprocess.Popen[bytes]":
    os.waitpid(child, os.WUNTRACED)
    command = [
        "strace",
        "-qq",
        "-f",
        "-o",
        os.devnull,
        "-p",
        str(child),
        "-e",
        f"trace={','.join(SYSCALLS)}",
        "-e",
        trace,
    ]
    tracer = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while "TracerPid:\t0\n" in Path(f"/proc/{child}/status").read_text():
        if tracer.poll() is not None:
            os.kill(child, signal.SIGKILL)
            raise OSError("strace cannot attach to a process here")
        time.sleep(0.002)
    os.kill(child, signal.SIGCONT)
    return tracer


def limited(size: int) -> None:
    """Have the kernel kill the process at the write that makes a file larger than `size` bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def nothing() -> None:
    """Prepare nothing."""


def points(action: Callable[[], object], kind: str, reset: Callable[[], object], most: int = 400) -> Iterator[bool]:
    """Reset, run and kill an action at its first, second, … point until it gets to its end; yield after each."""
    if kind == "syscalls":
        for name in SYSCALLS:
            yield from points(action, name, reset)
        return
    for point in range(1, most):
        reset()
        if kind == "calls":
            done = in_child(action, Killer(point - 1).install)
        elif kind == "sizes":
            done = in_child(action, partial(limited, (point - 1) * 512))
        else:
            done = in_child(action, nothing, f"inject={kind}:signal=KILL:when={point}")
        yield not done
        if done:
            return
    raise AssertionError(f"{most} points were not enough")


def left_half_way(folder: Path) -> None:
    """Make a folder whose save was killed between its renames: network 2 replaced by 4."""
    normswap.save(MODELS[2], folder)
    with tempfile.TemporaryDirectory() as other:
        normswap.save(MODELS[4], other)
        for name in ("model.safetensors", "README.md"):
            (folder / f".{name}.0123abcd.tmp").mkdir()
            os.replace(Path(other, name), folder / f".{name}.0123abcd.tmp" / name)
        os.replace(Path(other, "config.json"), folder / "config.json")


def survived(kind: str, scenario: str) -> Counter[str]:
    """Try every point of one scenario; count what was found afterwards."""
    found: Counter[str] = Counter()
    folder = Path(tempfile.mkdtemp()) / "OUT"
    before: dict[str, Callable[[], object]] = {
        "first save": nothing,
        "save over a checkpoint": lambda: normswap.save(MODELS[2], folder),
        "save over a killed save": lambda: left_half_way(folder),
        "load of a killed save": lambda: left_half_way(folder),
    }
    expected = {"first save": (0, 8), "save over a checkpoint": (2, 8), "save over a killed save": (4, 8)}
    allowed = expected.get(scenario, (4,))

    def reset() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        before[scenario]()

    def action() -> None:
        if allowed == (4,):
            normswap.load(folder, model=network())
        else:
            normswap.save(MODELS[8], folder)

    for killed in points(action, kind, reset):
        fresh = not (folder / "config.json").exists()
        here = 0 if fresh else generation(folder)
        if here not in allowed or (not killed and here != allowed[-1]):
            raise AssertionError(f"{scenario}: network {here} after {sum(found.values())} points")
        found["killed" if killed else "complete"] += 1
        found["new" if here == allowed[-1] else "old"] += killed
        normswap.save(MODELS[8], folder)
        names = sorted(file.name for file in folder.iterdir())
        if names != ["README.md", "config.json", "model.safetensors"] or generation(folder) != 8:
            raise AssertionError(f"the next save leaves {names}")
    shutil.rmtree(folder.parent)
    return found


SCENARIOS = ("first save", "save over a checkpoint", "save over a killed save", "load of a killed save")


def main() -> None:
    torch.set_num_threads(1)
    kinds = sys.argv[1:] or ["calls", "sizes", *(["syscalls"] if shutil.which("strace") else [])]
    rows = []
    for kind in kinds:
        for scenario in SCENARIOS[1:2] if kind == "sizes" else SCENARIOS:
            rows.append({"kind": kind, "scenario": scenario, **survived(kind, scenario)})
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
