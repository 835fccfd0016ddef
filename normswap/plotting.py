"""Draw: the only file that knows matplotlib."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from normswap.errors import InvalidOption, way_to_have
from normswap.texts import plain
from normswap.writing import must_be_writable

if TYPE_CHECKING:
    from normswap.planning.plan import Plan

NAMED, WORST = 60, 8
"""Up to this many norms are all named on the axis; of more, only some of those that drift most."""

APART = 0.025
"""Names on the axis keep this share of its length between them, or they would be printed over each other."""

LONGEST = 40
"""Letters of a name on the axis; of longer ones the end is shown."""

MEANING = """drift 0.8: a sample's own statistics move a norm's output
four fifths as much as samples differ there"""


def must_be_drawable(path: Path) -> None:
    """Raise where no figure can be drawn to a file, before anything is computed.

    Raises:
        InvalidOption: matplotlib is not installed, the suffix is no image format, or the file cannot be written.
    """
    drawn, _ = figure(1, 1)
    formats = drawn.canvas.get_supported_filetypes()
    if (suffix := path.suffix.lower().removeprefix(".") or "png") not in formats:
        raise InvalidOption(f"--plot {path}: {suffix!r} is no image format; there are {', '.join(sorted(formats))}")
    must_be_writable(path, "--plot")


def figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    """Return an empty figure and its axes; an array of them where there are several columns.

    Raises:
        InvalidOption: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InvalidOption(f"--plot needs matplotlib; {way_to_have('matplotlib', extra='plot')}") from error
    drawn = Figure(figsize=(width, height), layout="constrained")
    axes = drawn.subplots(ncols=columns)
    for each in drawn.axes:
        each.spines[["top", "right"]].set_visible(False)
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


def draw_plan(plan: "Plan", path: Path, title: str = "") -> None:
    """Draw the expected drift of every norm to an image file.

    Raises:
        InvalidOption: No norm has a drift to draw, or the file cannot be written.
    """
    write(plan_figure(plan, title), path)


def plan_figure(plan: "Plan", title: str = "") -> Any:
    """Return a figure of the expected drift of every norm, in the order of the network.

    Args:
        plan: The plan.
        title: What was converted.

    Raises:
        InvalidOption: No norm has a drift to draw.
    """
    norms = [entry for entry in plan.norms if entry.drift is not None]
    if not norms:
        raise InvalidOption("--plot: no norm is trained, so there is no drift to draw; pass --weights FILE")
    drifts = [float(entry.drift or 0) for entry in norms]
    before = [
        (place, entry.drift_before)
        for place, entry in enumerate(norms)
        if entry.drift_before is not None and abs(entry.drift_before - drifts[place]) >= 0.005
    ]
    drawn, axes = figure(min(max(6.4, 0.22 * len(norms)), 14), 4.8)
    axes.vlines(range(len(norms)), 0, drifts, color="0.85", linewidth=1)
    if before:
        axes.scatter(*zip(*before, strict=True), s=16, facecolors="none", edgecolors="0.45", linewidths=0.8,
                     label="filters as they were", zorder=2)  # fmt: skip
    counts = sorted({entry.groups or 0 for entry in norms})
    for count in counts:
        places = [i for i, entry in enumerate(norms) if (entry.groups or 0) == count]
        label = f"{count} group{'s' if count != 1 else ''}" if count else "no groups"
        axes.scatter(places, [drifts[i] for i in places], s=18, label=label, zorder=3)
    highest = max([*drifts, *(drift for _, drift in before)])
    if highest >= 1:
        axes.axhline(1, color="0.5", linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    named = range(len(norms)) if len(norms) <= NAMED else _worst(drifts)
    axes.set_xticks(named, [_end(norms[i].name) for i in named], rotation=90, fontsize=7)
    axes.set(ylabel="expected drift", xlabel="norm, in the order of the network", xlim=(-1, len(norms)))
    axes.set_ylim(0, (highest or 1) * 1.05)
    some = "" if len(norms) <= NAMED else "; named are some that drift most"
    heading = f"{len(norms)} norm{'s' if len(norms) != 1 else ''}{some}"
    drawn.suptitle(f"{_end(title)}: {heading}" if title else heading, fontsize=11)
    axes.set_title(MEANING, fontsize=8, color="0.3")
    drawn.legend(frameon=False, fontsize=8, ncols=int(drawn.get_figwidth() // 1.5), loc="outside lower center")
    return drawn


def _worst(drifts: list[float]) -> list[int]:
    """Return the places of the norms that drift most, none so near another that their names would meet."""
    chosen: list[int] = []
    for place in sorted(range(len(drifts)), key=drifts.__getitem__, reverse=True):
        if all(abs(place - other) > APART * len(drifts) for other in chosen):
            chosen.append(place)
        if len(chosen) == WORST:
            break
    return sorted(chosen)


def _end(name: str) -> str:
    """Return a name, or the end of a long one, without what matplotlib reads as mathematics."""
    shown = plain(name or "(root)")
    return (shown if len(shown) <= LONGEST else f"…{shown[1 - LONGEST :]}").replace("$", r"\$")
