"""Optional packages: each extra is named in the README, with a way to have it that works in a clone."""

import re
import tomllib
from pathlib import Path

import pytest

from normswap.errors import way_to_have

ROOT = Path(__file__).parent.parent
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
HINTS = re.findall(
    r"way_to_have\(.*?extra=['\"](\w+)",
    "".join(path.read_text(encoding="utf-8") for path in (ROOT / "normswap").rglob("*.py")),
)


@pytest.mark.parametrize("extra", EXTRAS)
def test_every_extra_is_explained(extra: str) -> None:
    assert f"| `{extra}` |" in README
    assert "`pip install '.[…]'`" in README


def test_hints_name_extras_that_exist() -> None:
    assert set(HINTS) >= {"plot", "onnx"}
    assert set(HINTS) <= set(EXTRAS)
    assert not re.search(r"pip install '?normswap", README)  # which is on no index


def test_a_hint_installs_by_name_or_in_a_clone() -> None:
    assert way_to_have("a", "b", extra="c") == "pip install a b, or in a clone of normswap pip install '.[c]'"
