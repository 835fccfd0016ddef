"""The page of a plan: everything is in it, nothing in it becomes markup, and it works in a browser of any width."""

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from browser import chromium, show

from normswap.conversion.checks import Check, Checks
from normswap.errors import InvalidOption
from normswap.planning.choices import WS, Action, Affine
from normswap.planning.entry import ConvEntry, NormEntry
from normswap.planning.options import Options
from normswap.planning.plan import Plan

HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "</td></script><script>alert(2)</script>",
    "a\"b'c&amp;{{script}}",
    "red\x1b[31m\u202e",
    "x" * 400,
)


def norm(name: str, drift: float | None = 0.25, before: float | None = 0.5) -> NormEntry:
    return NormEntry(name, "BatchNorm2d", Action.GROUP_NORM, f"why {name}", channels=8, eps=1e-5, groups=4,
                     drift=drift, drift_before=before, affine=Affine.MATCH)  # fmt: skip


def conv(name: str) -> ConvEntry:
    return ConvEntry(name, "Conv2d", Action.STANDARDIZE, "its norm is trained", channels=8, eps=0.0, ws=WS.ADAPTIVE)


def plan_of_size(norms: int) -> Plan:
    entries = [entry for i in range(norms) for entry in (conv(f"conv{i}"), norm(f"bn{i}", i / norms, 1.2 * i / norms))]
    return Plan(Options(), (*entries, ConvEntry("head", "Conv2d", Action.KEEP, "no norm reads it", channels=8)))


class Markup(HTMLParser):
    """What a browser makes of a page: tags with their attributes, and the text between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_names_are_text_wherever_they_stand(name: str, tmp_path: Path) -> None:
    entries = (norm(name), ConvEntry("c", name, Action.KEEP, f"read by {name}", aliases=(name,)))
    plan = Plan(Options(include=(name,)), entries, (f"mind {name}",))
    checks = Checks((Check(name, False, name),))
    page = plan.report(tmp_path / "a.html", title=name, command=f"normswap {name}", checks=checks).read_text("utf-8")
    found = Markup(page)
    plain = Markup(Plan(Options(include=("x",)), (norm("x"), ConvEntry("c", "x", Action.KEEP, "read by x", ("x",))),
                        ("mind x",)).report(tmp_path / "b.html", title="x", command="normswap x",
                                            checks=Checks((Check("x", False, "x"),))).read_text("utf-8"))  # fmt: skip
    assert [tag for tag, _ in found.tags] == [tag for tag, _ in plain.tags]
    assert not any(key.startswith("on") for _, attributes in found.tags for key in attributes)
    shown = name.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e")
    assert sum(shown in text for text in found.texts) >= 8
    assert page.isascii() or "\u202e" not in page
    assert "\x1b" not in page


def test_nothing_is_loaded_from_elsewhere(tmp_path: Path) -> None:
    page = plan_of_size(3).report(tmp_path / "plan.html").read_text("utf-8")
    assert "default-src 'none'" in page
    assert not re.search(r"""(src|href|action)\s*=|@import|url\(""", page)
    assert set(re.findall(r"https?://[^\"'\s]+", page)) == {"http://www.w3.org/2000/svg"}


def test_every_layer_has_a_row_and_every_check_a_mark(tmp_path: Path) -> None:
    plan = plan_of_size(20)
    checks = Checks((Check("shapes", True, "same"), Check("gradients", False, "lost in bn3"), Check("x", None, "-")))
    page = plan.report(tmp_path / "a.html", title="net", command="normswap convert net", checks=checks).read_text(
        "utf-8"
    )
    texts = Markup(page).texts
    assert all(entry.name in texts and entry.reason in texts for entry in plan.entries)
    assert [text for text in texts if text in ("ok", "FAILED", "n/a")] == ["ok", "FAILED", "n/a"]
    assert {"normswap convert net", "lost in bn3"} <= set(texts)


def test_a_plan_without_drift_has_no_chart(tmp_path: Path) -> None:
    page = Plan(Options(), (norm("bn", None, None),)).report(tmp_path / "a.html").read_text("utf-8")
    assert 'id="chart"' not in page


def test_a_page_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidOption, match=r"report .*nowhere/a.html: there is no folder .*nowhere; make it first"):
        plan_of_size(1).report(tmp_path / "nowhere" / "a.html")
    with pytest.raises(InvalidOption, match="Is a directory; write it elsewhere"):
        plan_of_size(1).report(tmp_path)


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    with chromium() as driver:
        yield driver


def shown(page: Any) -> list[str]:
    """Return the names of the rows that are shown, from top to bottom."""
    script = "return [...document.querySelectorAll('tbody tr:not([hidden]) td.name')].map((cell) => cell.textContent)"
    return list(page.execute_script(script))


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [400, 800, 1280])
@pytest.mark.parametrize("norms", [20, 600])
def test_it_fits_and_shows_every_norm(page: Any, tmp_path: Path, width: int, norms: int, dark: bool) -> None:
    plan = plan_of_size(norms)
    show(page, plan.report(tmp_path / "plan.html", title="a_net" * 30).as_uri(), width=width, dark=dark)
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    assert len(shown(page)) == 2 * norms + 1
    assert page.execute_script("return document.querySelectorAll('#chart .after').length") == norms
    ink, back = page.execute_script("const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]")
    light = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ink, back)]
    assert (light[0] > light[1] + 400) if dark else (light[1] > light[0] + 400)
    assert page.get_log("browser") == []


def test_hostile_names_run_nothing(page: Any, tmp_path: Path) -> None:
    plan = Plan(Options(), tuple(map(norm, HOSTILE)))
    show(page, plan.report(tmp_path / "plan.html", title=HOSTILE[1]).as_uri(), width=400)
    assert page.execute_script("return document.images.length + document.scripts.length") == 1
    assert page.execute_script("return document.documentElement.scrollWidth") <= 400
    assert page.get_log("browser") == []


def test_rows_are_sorted_and_filtered(page: Any, tmp_path: Path) -> None:
    show(page, plan_of_size(12).report(tmp_path / "plan.html").as_uri(), width=1280)
    page.execute_script("document.querySelector('th:nth-child(7) button').click()")
    assert shown(page)[:3] == ["bn11", "bn10", "bn9"]
    page.execute_script("document.querySelector('th:nth-child(2) button').click()")
    assert shown(page)[:3] == ["bn0", "bn1", "bn2"]
    assert shown(page)[10:12] == ["bn10", "bn11"]
    find = page.find_element("id", "find")
    find.send_keys("BN1 groupnorm")
    assert shown(page) == ["bn1", "bn10", "bn11"]
    assert page.find_element("id", "count").text == "3 of 25 layers"
    find.send_keys(" nothing")
    assert shown(page) == []
    page.find_element("id", "clear").click()
    page.execute_script(
        "const show = document.getElementById('show'); show.value = 'left'; show.dispatchEvent(new Event('change'))"
    )
    assert shown(page) == ["head"]


def test_the_chart_is_walked_with_keys(page: Any, tmp_path: Path) -> None:
    show(page, plan_of_size(12).report(tmp_path / "plan.html").as_uri(), width=400)
    chart = page.find_element("id", "chart")
    told = page.find_element("id", "told")
    for keys, name in (("\ue012", "bn0"), ("\ue014\ue014", "bn2"), ("\ue010", "bn11"), ("\ue012", "bn10")):
        chart.send_keys(keys)
        assert told.text.startswith(f"{name} – GroupNorm(4), drift ")
    page.find_element("id", "find").send_keys("conv")
    chart.send_keys("\ue007")
    assert page.execute_script("return document.activeElement.querySelector('.name').textContent") == "bn10"
    assert "bn10" in shown(page)
