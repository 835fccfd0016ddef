"""What a network's code keeps outside of it is as before, whatever was looked at, converted or refused."""

import functools
import importlib
import itertools
import queue
import random
import sys
import warnings
from array import array
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normswap

CACHE: dict[Any, Any] = {"kept": 1}
NESTED: dict[str, list[Any]] = {"shapes": []}
LOG: list[Any] = ["kept"]
ORDERED: OrderedDict[str, Any] = OrderedDict(a=1, b=2)
COUNTS: Counter[str] = Counter(passes=3)
LAST: deque[Any] = deque([1, 2], maxlen=2)
SEEN: set[Any] = {"kept"}
CALLS = 0
BUFFER = torch.zeros(2)
MAILBOX: queue.Queue[Any] = queue.Queue()
ELSEWHERE: Any = ModuleType("elsewhere")
ELSEWHERE.calls, ELSEWHERE.log = 0, []
BYTES, NUMBERS = bytearray(b"a"), array("i", [1])
DICE, NUMPY_DICE, TORCH_DICE = random.Random(0), np.random.default_rng(0), torch.Generator().manual_seed(0)
DEPTH: ContextVar[int] = ContextVar("depth", default=0)
TICKETS = itertools.count(7)
LARGE = torch.zeros(2**20 + 1)


class Meter:
    total = 0

    def __init__(self) -> None:
        self.count, self.values = 0, list[Any]()

    def __deepcopy__(self, _: object) -> "Meter":
        return self

    def add(self, value: Any) -> None:
        self.count += 1
        self.values.append(value)
        Meter.total += 1


class Slots:
    __slots__ = ("count", "unset")

    def __init__(self) -> None:
        self.count = 0


class Registry(dict[str, Any]):
    """A dict with an interface of its own."""

    def get(self, key: str) -> Any:  # type: ignore[override]
        raise KeyError

    __iter__ = keys = values = items = copy = clear = update = None  # type: ignore[assignment]

    def __len__(self) -> int:
        raise TypeError


class Lazy:
    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(name)


METER = Meter()
REGISTRY = Registry(kept=1)
LAZY = Lazy()
SLOTS = Slots()
ARRAY = np.zeros(3)


@functools.lru_cache
def grid(size: int, device: str) -> Tensor:
    return torch.zeros(size, device=device)


def remember(x: Tensor) -> None:
    CACHE[x.shape] = torch.arange(x.shape[-1], device=x.device)
    NESTED["shapes"].append(x.shape)


class Base(nn.Module):
    passes = 0
    history: list[Any] = []  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.meter = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), METER
        self.outputs, self.calls = list[Any](), 0
        self.register_buffer("queue", torch.zeros(4))

    def step(self, x: Tensor) -> None:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        self.step(x)
        return self.bn(self.conv(x))


def a_global(self: Any, x: Tensor) -> None:
    global CALLS
    CALLS += 1


def containers(self: Any, x: Tensor) -> None:
    LOG.append(x)
    ORDERED["c"] = x
    ORDERED.move_to_end("a")
    COUNTS["passes"] += 1
    LAST.append(x)
    SEEN.add(x.shape)


def of_the_class(self: Any, x: Tensor) -> None:
    type(self).passes += 1
    self.history.append(x)
    type(self).added = x


def of_the_module(self: Any, x: Tensor) -> None:
    self.calls += 1
    self.outputs.append(x)
    self.queue[0] += 1
    self.new = x


def default(self: Any, x: Tensor, memory: dict[str, int] = {}) -> None:  # noqa: B006
    memory["n"] = memory.get("n", 0) + 1


def random_numbers(self: Any, x: Tensor) -> None:
    torch.rand(3)
    np.random.rand()


def in_place(self: Any, x: Tensor) -> None:
    x.mul_(2)
    BUFFER.add_(1)


def slots(self: Any, x: Tensor) -> None:
    SLOTS.count += 1
    SLOTS.unset = x


def odd_objects(self: Any, x: Tensor) -> None:
    REGISTRY["new"] = LAZY


def an_array(self: Any, x: Tensor) -> None:
    ARRAY[0] += 1


def another_module(self: Any, x: Tensor) -> None:
    ELSEWHERE.calls += 1
    ELSEWHERE.log.append(x)


def sequences_of_numbers(self: Any, x: Tensor) -> None:
    BYTES.append(1)
    NUMBERS[0] += 1


def generators(self: Any, x: Tensor) -> None:
    DICE.random()
    NUMPY_DICE.random()
    torch.rand(1, generator=TORCH_DICE)


class Counting(nn.BatchNorm2d):
    passes = 0

    def forward(self, x: Tensor) -> Tensor:
        Counting.passes += 1
        return super().forward(x)


HELD = ("_parameters", "_buffers", "_modules", "_normswap_plan", "_state_dict_hooks", "_load_state_dict_pre_hooks")
"""Attributes of a network that its conversion is there to change."""

STEPS: dict[str, Callable[[Any, Tensor], None]] = {
    "a global variable": a_global,
    "module-level containers": containers,
    "a cache behind a function": lambda self, x: remember(x),
    "a class": of_the_class,
    "a module": of_the_module,
    "an object that is not copied": lambda self, x: self.meter.add(x),
    "a function's cache": lambda self, x: grid(x.shape[-1], str(x.device)).shape,
    "a mutable default": default,
    "a queue": lambda self, x: MAILBOX.put(x),
    "random numbers": random_numbers,
    "tensors": in_place,
    "slots": slots,
    "odd objects": odd_objects,
    "an array": an_array,
    "another module of Python": another_module,
    "bytes and numbers": sequences_of_numbers,
    "generators of its own": generators,
    "a context variable": lambda self, x: DEPTH.set(DEPTH.get() + 1),
    "an order": lambda self, x: ORDERED.move_to_end("a"),
}


def _slots() -> dict[str, Any]:
    return {name: getattr(SLOTS, name) for name in Slots.__slots__ if hasattr(SLOTS, name)}


def world(model: Any, step: Any) -> Any:
    """Return all that a step may change, as data."""
    own = {key: value for key, value in vars(model).items() if key not in HELD}
    of_the_file = CACHE, NESTED, LOG, ORDERED, COUNTS, LAST, SEEN, CALLS, BUFFER, _slots(), ARRAY, "new" in REGISTRY
    of_tools = (
        vars(METER),
        Meter.total,
        list(MAILBOX.queue),
        MAILBOX.unfinished_tasks,
        grid.cache_info().currsize,
        step.__defaults__,
    )
    of_the_model = type(model).passes, type(model).history, hasattr(type(model), "added"), own, model.queue
    dice = DICE.getstate(), NUMPY_DICE.bit_generator.state, TORCH_DICE.get_state().sum(), DEPTH.get()
    more = ELSEWHERE.calls, ELSEWHERE.log, BYTES, NUMBERS, dice
    return repr((of_the_file, of_tools, of_the_model, more, torch.get_rng_state().sum(), np.random.get_state()[2]))


@pytest.mark.parametrize("fails", [False, True], ids=["runs", "fails"])
@pytest.mark.parametrize("how", ["inspect", "convert", "in place", "images", "check"])
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_left_as_it_was(step: Callable[[Any, Tensor], None], how: str, fails: bool) -> None:
    model = type("Net", (Base,), {"step": step, "passes": 0, "history": []})()
    nn.init.normal_(model.bn.running_mean)
    if fails:
        model.bn.weight.data[0] = float("nan")
    if how == "check":
        model = normswap.convert(model, example_input=torch.zeros(2, 3, 9, 9), check=False)
    x = torch.ones(2, 3, 9, 9)
    before = world(model, step)
    try:
        if how == "inspect":
            normswap.inspect(model, example_input=x)
        elif how == "check":
            normswap.check(model, example_input=x)
        else:
            batches = [x] if how == "images" else None
            normswap.convert(model, example_input=x, inplace=how == "in place", batches=batches)
    except normswap.NormswapError:
        assert fails
    assert world(model, step) == before
    assert (x == 1).all()


def test_what_a_norm_counts_while_it_is_shown_to_be_one() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Counting(8))
    normswap.inspect(model, example_input=torch.zeros(2, 3, 9, 9))
    assert Counting.passes == 0


LOST: dict[str, tuple[Callable[[Any, Tensor], object], str]] = {
    "a counter": (lambda self, x: next(TICKETS), r"an itertools.count\(\d+\)"),
    "a large tensor": (lambda self, x: LARGE.add_(1), r"a tensor \(1048577,\) outside of the network"),
}


@pytest.mark.parametrize(("step", "what"), LOST.values(), ids=LOST)
def test_what_cannot_be_put_back_is_named(step: Callable[[Any, Tensor], object], what: str) -> None:
    model = type("Net", (Base,), {"step": step})()
    with pytest.warns(UserWarning, match=f"^a forward pass of a copy changed {what}, which cannot be put back$"):
        normswap.inspect(model, example_input=torch.zeros(2, 3, 9, 9))
    next(TICKETS)
    LARGE.add_(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        normswap.inspect(
            type("Net", (Base,), {"step": lambda self, x: (TICKETS, LARGE)})(), example_input=torch.zeros(2, 3, 9, 9)
        )


def closing(model: Any, store: list[Any]) -> Callable[..., None]:
    count = 0

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        nonlocal count
        count += 1
        store.append(output)
        model.outputs.append(output)
        model.queue.add_(1)
        hook.calls = count  # type: ignore[attr-defined]

    return hook


def test_what_hooks_close_over() -> None:
    model, store = type("Net", (Base,), {"step": lambda self, x: None})(), list[Any]()
    hook = closing(model, store)
    model.conv.register_forward_hook(hook)
    kept = list[Any]()
    model.conv.register_forward_hook(lambda module, args, output: kept.append(output))
    appended = list[Any]()
    model.bn.register_forward_pre_hook(functools.partial(lambda values, module, args: values.append(args), appended))
    normswap.convert(model, example_input=torch.zeros(2, 3, 9, 9))
    assert (store, kept, appended, model.outputs, vars(hook)) == ([], [], [], [], {})
    assert hook.__closure__ is not None
    assert model.queue.eq(0).all()
    assert all(cell.cell_contents != 1 for cell in hook.__closure__ if isinstance(cell.cell_contents, int))


def test_what_hooks_of_the_whole_program_keep() -> None:
    model, seen = type("Net", (Base,), {"step": lambda self, x: None})(), list[Any]()
    handles = [
        nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(output)),
        nn.modules.module.register_module_forward_pre_hook(lambda module, args: seen.append(args)),
    ]
    try:
        normswap.check(normswap.convert(model, example_input=torch.zeros(2, 3, 9, 9)))
    finally:
        for handle in handles:
            handle.remove()
    assert seen == []


def test_a_pass_that_fails_leaves_nothing_either() -> None:
    def step(self: Any, x: Tensor) -> None:
        LOG.append(x)
        raise RuntimeError("no")

    before = list(LOG)
    with pytest.raises(normswap.NeedsExampleInput, match=r"RuntimeError: no\)"):
        normswap.convert(type("Net", (Base,), {"step": step})(), example_input=torch.zeros(2, 3, 9, 9))
    assert before == LOG


def test_an_example_that_a_network_changes_in_place_is_as_it_was() -> None:
    class Changes(Base):
        def forward(self, ids: Tensor) -> Tensor:
            ids.add_(1)
            return self.bn(self.conv(F.one_hot(ids, 3).permute(0, 3, 1, 2).float()))

    ids = torch.zeros(2, 9, 9, dtype=torch.long)
    normswap.check(normswap.convert(Changes(), example_input=ids), example_input=ids)
    assert ids.eq(0).all()


class Imports(Base):
    """Asks whether something is imported, and imports something."""

    def step(self, x: Tensor) -> None:
        if "torch_xla" not in sys.modules:
            importlib.import_module("this_is_imported_once")


def test_what_a_pass_imports_stays_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken out of `sys.modules` again, it was imported a second time, which many modules do not survive."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "this_is_imported_once.py").touch()
    normswap.convert(Imports(), example_input=torch.zeros(2, 3, 8, 8))
    assert sys.modules.pop("this_is_imported_once", None)
