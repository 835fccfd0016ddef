"""``normswap demo``: convert a small trained network and fine-tune it far from its task, one image at a time."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Group
from torch import Tensor, nn

from normswap import plotting
from normswap.conversion.check import check
from normswap.conversion.pipeline import convert
from normswap.demo.digits import digits_resnet, load_digits
from normswap.networks.copying import copy_model
from normswap.tables import layout, stacked, table

STEPS, SEED = 400, 0
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
"""Far enough apart and far enough out that no form has its best at the edge."""

NAMES = {
    "BatchNorm": "BatchNorm, batch statistics",
    "frozen": "BatchNorm, frozen statistics",
    "copied": "GroupNorm + WS, γ, β copied",
    "normswap": "normswap convert",
}


@dataclass(frozen=True)
class Row:
    """Test accuracies in percent of one form of the network.

    Attributes:
        name: Of the form, a key of `NAMES`.
        kept: On the digits that the original was trained on, before any tuning.
        tuned: On turned and inverted digits, after tuning at each of `RATES`.
    """

    name: str
    kept: float
    tuned: tuple[float, ...]

    @property
    def best(self) -> float:
        """Accuracy at the rate that suits the form best."""
        return max(self.tuned)


@dataclass(frozen=True)
class Demo:
    """What the demo measured."""

    rows: tuple[Row, ...]
    test_images: int
    checks_hold: bool
    seconds: float

    def __str__(self) -> str:
        """Return the accuracies as a table for people."""
        lines, header, title, end = self._parts()
        return f"{title}\n\n{table(lines, header=header)}\n\n{end}"

    def __rich__(self) -> Group:
        """Return the same as `rich` fits it to a terminal."""
        lines, header, title, end = self._parts()
        return stacked(title, "", layout(lines, header=header), "", end)

    def _parts(self) -> tuple[list[list[str]], list[str], str, str]:
        """Return the table's rows and header, what it shows, and how it was made."""
        lines = [
            [NAMES[row.name], *(f"{share:.0f} %" for share in (row.kept, *row.tuned, row.best))] for row in self.rows
        ]
        header = ["", "kept", *(f"{rate:.0e}".replace("e-0", "e-") for rate in RATES), "best"]
        title = (
            f"accuracy on {self.test_images} held-out digits: kept, before any tuning; then of the same digits turned\n"
            f"and inverted, after {STEPS} steps of one image each, by learning rate"
        )
        holds = "all checks hold" if self.checks_hold else "A CHECK FAILED"
        return lines, header, title, f"SGD with momentum 0.9, one seed; {holds}"

    def to_dict(self) -> dict[str, Any]:
        """Return JSON data."""
        return {
            "accuracy": {
                row.name: {"kept": row.kept, "tuned": dict(zip(map(str, RATES), row.tuned, strict=True))}
                for row in self.rows
            },
            "tuning": {"steps": STEPS, "batch_size": 1, "learning_rates": list(RATES), "seed": SEED},
            **{key: value for key, value in asdict(self).items() if key != "rows"},
        }


def run(note: Callable[[str], None] = lambda _: None) -> Demo:
    """Convert the shipped digits network in two ways, and tune it in four on turned and inverted digits.

    Args:
        note: Called with a line of text as each part begins.
    """
    started = time.perf_counter()
    *_, images, labels = load_digits()
    original = digits_resnet()
    converted = convert(original, batches="synthetic", example_input=images[:2])
    networks = {
        "BatchNorm": original,
        "frozen": original,
        "copied": convert(original, affine="copy", ws="standard", example_input=images[:2]),
        "normswap": converted,
    }
    rows = []
    with _one_thread():
        for name, network in networks.items():
            note(f"tuning: {NAMES[name]} …")
            kept = accuracy(network, images, labels)
            tuned = tuple(_tuned(copy_model(network), rate, frozen=name == "frozen") for rate in RATES)
            rows.append(Row(name, kept, tuned))
    holds = bool(check(converted, original, example_input=images[:2]))
    return Demo(tuple(rows), len(images), holds, time.perf_counter() - started)


def far(images: Tensor) -> Tensor:
    """Return images turned by 90° and inverted: other digits to the network, made of strokes that it knows."""
    return -torch.rot90(images, 1, (2, 3))


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return top-1 accuracy in percent, in eval mode."""
    model.eval()
    with torch.no_grad():
        hits = sum(
            int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(256), labels.split(256), strict=True)
        )
    return 100 * hits / len(labels)


def _tuned(model: nn.Module, rate: float, *, frozen: bool) -> float:
    """Fine-tune a network one image at a time and return its test accuracy."""
    images, labels, test_images, test_labels = load_digits()
    generator = torch.Generator().manual_seed(SEED)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trainable, rate, momentum=0.9)
    model.train(not frozen)
    for _ in range(STEPS):
        chosen = torch.randint(len(images), (1,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(far(images[chosen])), labels[chosen]).backward()
        optimizer.step()
    return accuracy(model, far(test_images), test_labels)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread: on images of this size more of them only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def draw(result: Demo, path: Path) -> None:
    """Draw what each form keeps and what it learns to an image file.

    Raises:
        InvalidOption: matplotlib is not installed, or the file's suffix is no image format.
    """
    drawn, (left, right) = plotting.figure(9, 3.4, columns=2)
    colors = dict(zip(NAMES, ("0.65", "0.35", "C1", "C0"), strict=True))
    places = range(len(result.rows))
    bars = left.barh(places, [row.kept for row in result.rows], color=[colors[row.name] for row in result.rows])
    left.bar_label(bars, fmt="%.0f %%", padding=3)
    left.set_yticks(places, [NAMES[row.name].replace(", ", ",\n", 1) for row in result.rows])
    left.invert_yaxis()
    left.set(
        xlim=(0, 115), xticks=range(0, 101, 25), xlabel="accuracy on its own digits, %", title="kept, before any tuning"
    )
    for row in result.rows:
        right.plot(RATES, row.tuned, marker="o", markersize=4, color=colors[row.name])
    right.set(xscale="log", ylim=(0, 101), xlabel="learning rate", ylabel="accuracy on turned, inverted digits, %",
              title=f"learned in {STEPS} steps of one image")  # fmt: skip
    plotting.write(drawn, path)
