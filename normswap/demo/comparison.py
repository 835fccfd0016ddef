"""``normswap demo``: convert a small trained network and fine-tune it at batch size 2, beside BatchNorm."""

import time
from collections.abc import Callable
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

STEPS, EVERY, BATCH, LEARNING_RATE, SEED = 150, 25, 2, 3e-3, 0

NAMES = {
    "BatchNorm": "BatchNorm, as trained",
    "copied": "GroupNorm, γ and β copied + standard WS",
    "normswap": "normswap convert",
}


@dataclass(frozen=True)
class Row:
    """Test accuracy in percent of one network: `curve` holds (step, accuracy) pairs, step 0 before tuning."""

    name: str
    curve: tuple[tuple[int, float], ...]

    @property
    def before(self) -> float:
        """Accuracy before the first step."""
        return self.curve[0][1]

    @property
    def after(self) -> float:
        """Accuracy after the last step."""
        return self.curve[-1][1]


@dataclass(frozen=True)
class Demo:
    """What the demo measured."""

    rows: tuple[Row, ...]
    test_images: int
    checks_hold: bool
    seconds: float

    def __str__(self) -> str:
        """Return the accuracies as a table for people."""
        lines, header, end = self._parts()
        return f"{table(lines, header=header)}\n\n{end}"

    def __rich__(self) -> Group:
        """Return the same as `rich` fits it to a terminal."""
        lines, header, end = self._parts()
        return stacked(layout(lines, header=header), "", end)

    def _parts(self) -> tuple[list[tuple[str, str, str]], tuple[str, str, str], str]:
        """Return the table's rows and header, and what was done."""
        lines = [(NAMES[row.name], f"{row.before:.1f} %", f"{row.after:.1f} %") for row in self.rows]
        holds = "all checks hold" if self.checks_hold else "A CHECK FAILED"
        end = (
            f"fine-tuning: batch size {BATCH}, SGD with momentum 0.9, learning rate {LEARNING_RATE:g}; "
            f"{holds}; {self.seconds:.0f} s"
        )
        return lines, (f"accuracy on {self.test_images} held-out digits", "converted", f"{STEPS} steps"), end

    def to_dict(self) -> dict[str, Any]:
        """Return JSON data."""
        return {
            "accuracy": {row.name: {"converted": row.before, "tuned": row.after} for row in self.rows},
            "curves": {row.name: [list(point) for point in row.curve] for row in self.rows},
            "tuning": {"steps": STEPS, "batch_size": BATCH, "learning_rate": LEARNING_RATE, "seed": SEED},
            **{key: value for key, value in asdict(self).items() if key != "rows"},
        }


def run(note: Callable[[str], None] = lambda _: None) -> Demo:
    """Convert the shipped digits network in two ways, and tune all three alike on the training half of the data.

    Args:
        note: Called with a line of text as each part begins.
    """
    started = time.perf_counter()
    train_images, train_labels, test_images, test_labels = load_digits()
    original = digits_resnet()
    converted = convert(original, example_input=test_images[:2])
    networks = {
        "BatchNorm": original,
        "copied": convert(original, affine="copy", ws="standard", example_input=test_images[:2]),
        "normswap": converted,
    }
    rows = []
    for name, network in networks.items():
        note(f"tuning: {NAMES[name]} …")
        curve = _tuned(copy_model(network), train_images, train_labels, test_images, test_labels)
        rows.append(Row(name, tuple(curve)))
    holds = bool(check(converted, original, example_input=test_images[:2]))
    return Demo(tuple(rows), len(test_images), holds, time.perf_counter() - started)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return top-1 accuracy in percent, in eval mode."""
    model.eval()
    with torch.no_grad():
        hits = sum(
            int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(256), labels.split(256), strict=True)
        )
    return 100 * hits / len(labels)


def _tuned(
    model: nn.Module, images: Tensor, labels: Tensor, test_images: Tensor, test_labels: Tensor
) -> list[tuple[int, float]]:
    """Fine-tune a network and return its test accuracy on the way."""
    generator = torch.Generator().manual_seed(SEED)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trainable, LEARNING_RATE, momentum=0.9)
    curve = [(0, accuracy(model, test_images, test_labels))]
    for step in range(1, STEPS + 1):
        model.train()
        chosen = torch.randint(len(images), (BATCH,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
        if step % EVERY == 0:
            curve.append((step, accuracy(model, test_images, test_labels)))
    return curve


def draw(result: Demo, path: Path) -> None:
    """Draw the curves to an image file.

    Raises:
        InvalidOption: matplotlib is not installed, or the file's suffix is no image format.
    """
    drawn, axes = plotting.figure(6.4, 4)
    for row in result.rows:
        axes.plot(*zip(*row.curve, strict=True), marker="o", markersize=3, label=NAMES[row.name])
    axes.set(xlabel=f"fine-tuning steps at batch size {BATCH}", ylabel="test accuracy (%)", ylim=(0, 101))
    axes.legend(loc="lower right", frameon=False)
    plotting.write(drawn, path)
