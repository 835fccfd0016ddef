"""Draw: the only file that knows matplotlib."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normswap.errors import InvalidOption, way_to_have

if TYPE_CHECKING:
    from normswap.planning.plan import Plan

NAMED, WORST = 60, 8
"""Up to this many norms are all named on the axis; of more, only the ones that drift most."""


def must_be_drawable(path: Path) -> None:
    """Raise where nothing can be drawn to a file, before anything is computed.

    Raises:
        InvalidOption: matplotlib is not installed, the suffix is no image format, or the file cannot be written.
    """
    drawn, _ = figure(1, 1)
    formats = drawn.canvas.get_supported_filetypes()
    if path.suffix and path.suffix[1:].lower() not in formats:
        raise InvalidOption(
            f"--plot {path}: {path.suffix!r} is no image format; there are {', '.join(sorted(formats))}"
        )
    if not path.absolute().parent.is_dir():
        raise InvalidOption(f"--plot {path}: its folder does not exist; make it first, or choose another place")
    if path.is_dir() or not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise InvalidOption(f"--plot {path}: cannot be written; choose another place")


def figure(width: float, height: float) -> tuple[Any, Any]:
    """Return an empty figure and its axes.

    Raises:
        InvalidOption: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InvalidOption(f"--plot needs matplotlib; {way_to_have('matplotlib', extra='plot')}") from error
    drawn = Figure(figsize=(width, height), layout="constrained")
    axes = drawn.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return drawn, axes


def write(drawn: Any, path: Path) -> None:
    """Write a figure to an image file.

    Raises:
        InvalidOption: The suffix is no image format, or the file cannot be written.
    """
    try:
        drawn.savefig(path, dpi=150)
    except (ValueError, OSError) as error:
        raise InvalidOption(f"--plot {path}: {error}") from error


def draw_plan(plan: "Plan", path: Path) -> None:
    """Draw the expected drift of every norm, in the order of the network.

    Raises:
        InvalidOption: No norm has a drift to draw, or the file cannot be written.
    """
    norms = [entry for entry in plan.norms if entry.drift is not None]
    if not norms:
        raise InvalidOption("--plot: no norm is trained, so there is no drift to draw; pass --weights FILE")
    drifts = [float(entry.drift or 0) for entry in norms]
    drawn, axes = figure(min(max(6.4, 0.22 * len(norms)), 14), 4.8)
    counts = sorted({entry.groups or 0 for entry in norms})
    for count in counts:
        places = [i for i, entry in enumerate(norms) if entry.groups == count]
        label = f"{count} group{'s' if count != 1 else ''}"
        axes.scatter(places, [drifts[i] for i in places], s=18, label=label, zorder=3)
    axes.vlines(range(len(norms)), 0, drifts, color="0.85", linewidth=1)
    if len(norms) <= NAMED:
        axes.set_xticks(range(len(norms)), [entry.name for entry in norms], rotation=90, fontsize=7)
    else:
        worst = sorted(range(len(norms)), key=drifts.__getitem__, reverse=True)[:WORST]
        axes.set_xticks(sorted(worst), [norms[i].name for i in sorted(worst)], rotation=90, fontsize=7)
    axes.set(ylabel="expected drift of the output", ylim=(0, max(drifts) * 1.15), xlim=(-1, len(norms)))
    axes.set_title(f"{len(norms)} norms, in the order of the network", fontsize=10)
    axes.legend(frameon=False, fontsize=8, ncols=min(len(counts), 6), loc="upper right")
    write(drawn, path)
