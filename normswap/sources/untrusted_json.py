"""Read JSON that somebody else wrote: of bounded size and depth, every key once, every number finite."""

import json
import math
from pathlib import Path
from typing import Any

MAX_BYTES = 2**25
"""Size of a configuration above which it is refused unread; the largest network of timm needs about a megabyte."""


def read_json(path: Path) -> Any:
    """Return the data in a JSON file.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is too large, nested too deeply, no JSON, or JSON that two readers could understand differently.
    """
    if not path.is_file() and path.exists():
        raise ValueError("is no regular file")
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"is larger than {MAX_BYTES >> 20} MiB")
    return parse_json(content.decode("utf-8"))


def parse_json(text: str) -> Any:
    """Return the data that a text of JSON holds.

    Raises:
        ValueError: It is nested too deeply, no JSON, names a key twice, or holds a number that is not finite.
    """
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_finite, parse_float=_finite)
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"names {next(name for name in found if names.count(name) > 1)!r} twice")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value
