"""The site of the documentation: it builds without a warning, holds every public name, and reads well at any width."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from browser import chromium, show
from pages import ROOT

import normswap

pytest.importorskip("mkdocs")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site") / "dev"  # as mike puts one version beside others
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(folder)], cwd=ROOT,
        capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return folder


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Print nothing."""


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    (site.parent / "versions.json").write_text('[{"version": "dev", "title": "dev", "aliases": []}]')
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site.parent)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/dev"
        server.shutdown()
        thread.join()


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    text = (site / "api" / "index.html").read_text(encoding="utf-8")
    for name in set(normswap.__all__) - {"__version__"}:
        assert f'id="normswap.{name}"' in text, name
    assert "normswap.__version__" in text


def test_every_page_can_be_reached_and_every_example_is_a_page(site: Path) -> None:
    start = (site / "index.html").read_text(encoding="utf-8")
    for path in (ROOT / "docs").rglob("*.md"):
        page = path.relative_to(ROOT / "docs").with_suffix("")
        assert f'href="{page}/"' in start, page
    for path in (ROOT / "examples").glob("*.py"):
        assert (site / "examples" / path.stem / "index.html").exists()


@pytest.mark.parametrize(("width", "dark"), [(400, True), (1280, False)], ids=["400 dark", "1280 light"])
def test_pages_fit_and_load_nothing_from_elsewhere(site: Path, address: str, width: int, dark: bool) -> None:
    with chromium() as page:
        for path in sorted(site.rglob("index.html")):
            show(page, f"{address}/{path.parent.relative_to(site)}/", width=width, dark=dark)
            assert page.execute_script("return document.documentElement.scrollWidth") <= width, path
            scheme = page.execute_script("return document.body.getAttribute('data-md-color-scheme')")
            assert scheme == ("slate" if dark else "default")
            loaded = page.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
            assert all(url.startswith((address.removesuffix("dev"), "data:", "blob:")) for url in loaded), loaded
            assert page.get_log("browser") == [], path


def test_search_finds(address: str) -> None:
    with chromium() as page:
        show(page, f"{address}/", width=1280)
        wait = pytest.importorskip("selenium.webdriver.support.ui").WebDriverWait(page, 20)
        page.find_element("css selector", ".md-search__input").send_keys("federated")
        found = wait.until(lambda driver: driver.find_elements("css selector", ".md-search-result__item a"))
        assert any("how-to/federated/" in link.get_attribute("href") for link in found)
