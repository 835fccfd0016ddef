"""What a field of a stored plan may hold: a plan comes from a file, and a file may come from anybody.

A field says so where it is declared, ``field(metadata=ruled(count))``; `must_hold` reads it from there.
"""

import base64
import math
import struct
import sys
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from enum import StrEnum
from typing import Any

from normswap.limits import MAX_AXES, MAX_COUNT, MAX_DEPTH, MAX_ELEMENTS, MAX_SIDE, MAX_TEXT

SCHEMA = 1
"""Version of a plan's JSON form, and of the block in a checkpoint's configuration that holds it."""

DTYPES = frozenset(
    [
        *("float16", "bfloat16", "float32", "float64", "complex32", "complex64", "complex128"),
        *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool"),
        *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
    ]
)

Rule = Callable[[Any], bool]


def text(value: Any) -> bool:
    """A string of one line and bounded length, without characters that control a terminal."""
    return isinstance(value, str) and len(value) <= MAX_TEXT and (value.isprintable() or _is_one_line(value))


def _is_one_line(value: str) -> bool:
    return not {"Cc", "Cs", "Zl", "Zp"} & set(map(unicodedata.category, value))


def texts(value: Any) -> bool:
    """Several of `text`."""
    return isinstance(value, (list, tuple)) and all(map(text, value))


def count(value: Any, least: int = 1) -> bool:
    """A number of channels or groups."""
    return type(value) is int and least <= value <= MAX_COUNT


def sizes(value: Any) -> bool:
    """The shape of a tensor."""
    return isinstance(value, (list, tuple)) and len(value) <= MAX_AXES and all(count(size, 0) for size in value)


def slices(value: Any) -> bool:
    """Layers, each with the first channel and the end of a slice, one slice behind the other."""
    if not isinstance(value, (list, tuple)) or len(value) > MAX_COUNT:
        return False
    end = 0
    for own in value:
        if not isinstance(own, (list, tuple)) or len(own) != 3 or not text(own[0]):
            return False
        if not count(own[1], 0) or not count(own[2]) or not end <= own[1] < own[2]:
            return False
        end = own[2]
    return True


def number(value: Any) -> bool:
    """A finite number, as floats are."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def not_negative(value: Any) -> bool:
    """A finite number of at least 0."""
    return number(value) and value >= 0


def flag(value: Any) -> bool:
    """True or false."""
    return isinstance(value, bool)


def group_wish(value: Any) -> bool:
    """A group count, or ``"auto"``."""
    return value == "auto" or count(value)


def optional(rule: Rule) -> Rule:
    """Return a rule that None satisfies, too."""
    return lambda value: value is None or rule(value)


def one_of(*choices: str) -> Rule:
    """Return the rule that a value is one of some strings."""
    return lambda value: isinstance(value, str) and value in choices


def chosen(choices: type[StrEnum]) -> Rule:
    """Return the rule that a value is one of an enumeration's."""
    return one_of(*choices)


def ruled(rule: Rule) -> dict[str, Rule]:
    """Return the metadata that gives a dataclass' field the rule for what a file may put there."""
    return {"rule": rule}


def must_hold(data: Any, where: str, *kinds: type) -> None:
    """Raise ValueError unless data from a file has known fields alone, each of which holds what it may.

    Args:
        data: JSON data.
        where: What to call the data in errors.
        *kinds: Dataclasses whose fields have a rule each.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"{where} cannot be a {type(data).__name__}")
    rules: dict[str, Rule] = {declared.name: declared.metadata["rule"] for kind in kinds for declared in fields(kind)}
    for name, value in data.items():
        if name not in rules:
            raise ValueError(f"{where}: unknown field {name!r:.60}")
        if not rules[name](value):
            raise ValueError(f"{where}: {name} cannot be {value!r:.60}")


def unreadable(schema: Any) -> str:
    """Return why data of a schema cannot be read, and what to do; empty where it can be."""
    if type(schema) is int and 1 <= schema <= SCHEMA:
        return ""
    return f"has schema {schema!r:.60}, this normswap reads up to {SCHEMA}; upgrade normswap or convert again"


def packed(values: Sequence[float]) -> str:
    """Return numbers as text: base64 of little-endian 16-bit floats."""
    return base64.b64encode(struct.pack(f"<{len(values)}e", *values)).decode("ascii")


def unpacked(data: Any) -> tuple[float, ...]:
    """Return the numbers that `packed` wrote.

    Raises:
        ValueError: The data is no such text, or a number is 0 or not finite.
    """
    if not isinstance(data, str):
        raise ValueError(f"scales cannot be {data!r:.60}")
    content = base64.b64decode(data, validate=True)
    if len(content) % 2:
        raise ValueError("scales are cut off")
    values = struct.unpack(f"<{len(content) // 2}e", content)
    if not all(math.isfinite(value) and value for value in values):
        raise ValueError("scales must be finite numbers other than 0")
    return values


def must_be_inputs(spec: Any) -> None:
    """Raise ValueError unless the data is what `normswap.networks.inputs.describe` writes, and not too large."""
    if spec is not None and _elements(spec, MAX_DEPTH) > MAX_ELEMENTS:
        raise ValueError(f"the example inputs have more than {MAX_ELEMENTS} elements")


def _elements(spec: Any, depth: int) -> int:
    wrong = ValueError(f"an example input cannot be {spec!r:.60}")
    if not isinstance(spec, Mapping) or not spec or not depth:
        raise wrong
    if "tensor" in spec:
        shape = spec["tensor"]
        small = sizes(shape) and all(size < MAX_SIDE for size in shape)
        value = spec.get("value", 0)
        own = set(spec) - {"value"} == {"tensor", "dtype"} and type(value) is int and abs(value) < MAX_SIDE
        if not own or not small or spec["dtype"] not in DTYPES:
            raise wrong
        return math.prod(shape)
    kind, items = next(iter(spec.items()))
    container = dict if kind == "dict" else list
    if len(spec) != 1 or kind not in ("dict", "list", "tuple") or not isinstance(items, container):
        raise wrong
    return sum(_elements(item, depth - 1) for item in (items.values() if isinstance(items, dict) else items))
