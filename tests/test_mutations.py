"""A sample of the damaged checkpoint files that ``python tests/mutations.py 10000`` tries."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

COUNT = 300
SUMMED = ("model.safetensors", "config.json", "state.pth")
"""Files whose every byte is covered by a digest or a checksum; the others hold tensors and nothing that tells."""


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    script = [sys.executable, str(Path(__file__).with_name("mutations.py")), str(COUNT), "1"]
    process = subprocess.run(script, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    found: dict[str, Any] = json.loads(process.stdout)
    return found


@pytest.mark.parametrize(
    "kind", ["model.safetensors", "config.json", "state.safetensors", "state.pth", "legacy.pth", "sealed"]
)
def test_damage_is_named_or_does_not_matter(kind: str, result: dict[str, Any]) -> None:
    found = result["found"][kind]
    assert sum(found.values()) == COUNT // 6
    assert set(found) <= {"named", "identical", "silent" if kind != "sealed" else "loads as it says"}
    assert found["named"] > COUNT // 6 // 2
    if kind in SUMMED:
        assert "silent" not in found


def test_memory_stays_bounded(result: dict[str, Any]) -> None:
    assert result["grown_mib"] < 64
