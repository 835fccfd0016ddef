"""Figures of plans for papers: labelled, and with no name over another."""

from itertools import combinations
from pathlib import Path

import pytest

from normswap.errors import InvalidOption
from normswap.planning.choices import Action
from normswap.planning.entry import NormEntry
from normswap.planning.options import Options
from normswap.planning.plan import Plan
from normswap.plotting import draw_plan, must_be_drawable, plan_figure

backend_agg = pytest.importorskip("matplotlib.backends.backend_agg")


def plan_of(drifts: list[float], name: str = "stage#.fuse_layers.0.1.bn") -> Plan:
    known = {"action": Action.GROUP_NORM, "reason": "-", "channels": 32, "eps": 1e-5}
    norms = [
        NormEntry(name.replace("#", str(i)), "BN", groups=2 ** (i % 6), drift=drift, drift_before=2 * drift, **known)
        for i, drift in enumerate(drifts)
    ]
    return Plan(Options(), tuple(norms))


@pytest.mark.parametrize("worst", ["neighbours", "scattered"])
@pytest.mark.parametrize("norms", [1, 20, 60, 61, 325, 1200])
def test_no_text_meets_another_or_leaves_the_figure(norms: int, worst: str) -> None:
    drifts = [i / norms if worst == "neighbours" else (i * 7919 % norms) / norms for i in range(1, norms + 1)]
    drawn = plan_figure(plan_of(drifts), title="a_network_of_some_name")
    backend_agg.FigureCanvasAgg(drawn).draw()
    (axes,) = drawn.axes
    (legend,) = drawn.legends
    named = [label for label in axes.get_xticklabels() if label.get_text()]
    assert len(named) == norms if norms <= 60 else 4 <= len(named) <= 8
    for one, two in combinations([label.get_window_extent() for label in named], 2):
        assert not one.overlaps(two)
    for text in (drawn._suptitle, axes.title, axes.xaxis.label, axes.yaxis.label, legend, *named):
        box = text.get_window_extent()
        assert box.x0 >= 0, text
        assert box.y0 >= 0, text
        assert box.x1 <= drawn.bbox.x1, text
        assert box.y1 <= drawn.bbox.y1, text
    for text in (drawn._suptitle, axes.title, axes.xaxis.label):
        assert not any(text.get_window_extent().overlaps(label.get_window_extent()) for label in named)


def test_it_says_what_is_drawn() -> None:
    drawn = plan_figure(plan_of([0.2, 0.9]), title="resnet$18$")
    (axes,) = drawn.axes
    assert drawn.get_suptitle() == r"resnet\$18\$: 2 norms"
    assert axes.get_ylabel() == "expected drift"
    assert "drift 0.8: a sample's own statistics" in axes.get_title()
    assert [text.get_text() for text in drawn.legends[0].texts] == ["filters as they were", "1 group", "2 groups"]


def test_long_and_strange_names_are_drawn(tmp_path: Path) -> None:
    draw_plan(plan_of([0.1, 0.2, 0.3], "a\x1b$\\frac{" + "x" * 200 + "#"), tmp_path / "a.png", title="$^$_{" * 30)
    assert (tmp_path / "a.png").stat().st_size > 1000


@pytest.mark.parametrize("name", ["a.xyz", "a.html"])
def test_a_suffix_that_is_no_image_is_told_before_anything_is_drawn(name: str) -> None:
    with pytest.raises(InvalidOption, match=rf"--plot {name}: .* is no image format; there are .*png.*svg"):
        must_be_drawable(Path(name))
