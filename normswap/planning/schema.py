"""What each field of a stored plan may hold: a plan comes from a file, and a file may come from anybody."""

import math
from collections.abc import Callable, Mapping
from typing import Any

MAX_COUNT = 2**31 - 1
"""Largest count of channels or groups; torch's own kernels index no more."""
MAX_TEXT = 10_000
MAX_ELEMENTS = 2**28
"""Elements of all example inputs together, 1 GiB of float32."""
MAX_DEPTH = 32
DTYPES = frozenset(
    "float16 bfloat16 float32 float64 int8 int16 int32 int64 uint8 bool complex64 complex128".split()
)  # fmt: skip

Rule = Callable[[Any], bool]


def _text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_TEXT and value.isprintable()


def _texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_text, value))


def _count(value: Any, least: int = 1) -> bool:
    return type(value) is int and least <= value <= MAX_COUNT


def _sizes(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) <= 8 and all(_count(size, 0) for size in value)


def _input_sizes(value: Any) -> bool:
    return _sizes(value) and all(size < 2**20 for size in value)


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < math.inf


def _optional(rule: Rule) -> Rule:
    return lambda value: value is None or rule(value)


def _one_of(*choices: str) -> Rule:
    return lambda value: isinstance(value, str) and value in choices


def _group_wish(value: Any) -> bool:
    return value == "auto" or _count(value)


ENTRY: dict[str, Rule] = {
    "name": _text, "kind": _text, "reason": _text,
    "role": _one_of("norm", "conv"),
    "action": _one_of("group_norm", "scale", "standardize", "keep"),
    "aliases": _texts, "fed_by": _texts, "feeds": _texts, "then": _texts,
    "channels": lambda value: _count(value, 0),
    "shape": _optional(_sizes),
    "groups_asked": _optional(_group_wish),
    "groups": _optional(_count),
    "eps": _optional(lambda value: _number(value) and value >= 0),
    "drift": _optional(_number),
    "affine": _optional(_one_of("match", "copy")),
    "ws": _optional(_one_of("adaptive", "standard")),
    "by_user": lambda value: isinstance(value, bool),
}  # fmt: skip

OPTIONS: dict[str, Rule] = {
    "groups": _group_wish,
    "group_size": _optional(_count),
    "to": _text, "ws": _text, "affine": _text,
    "shrink": _optional(_number),
    "include": _texts, "exclude": _texts,
    "overrides": lambda value: isinstance(value, (list, tuple)) and all(map(_override, value)),
}  # fmt: skip


def _override(row: Any) -> bool:
    if not isinstance(row, (list, tuple)) or len(row) != 3:
        return False
    return _text(row[0]) and _text(row[1]) and (_text(row[2]) or _count(row[2]))


def must_be_entry(data: Mapping[str, Any]) -> None:
    """Raise ValueError unless every field is known and holds what it may, and the fields agree with each other."""
    where = f"the layer {data['name']!r}" if _text(data.get("name")) else "a layer"
    _must_hold(data, ENTRY, where)
    role, action = data["role"], data["action"]
    groups, channels = data.get("groups"), data.get("channels", 0)
    if action != "keep":
        if role != ("conv" if action == "standardize" else "norm") or data.get("eps") is None or not channels:
            raise ValueError(f"{where} cannot be a {role} with the action {action!r}")
        if (groups is None) == (action == "group_norm") or (data.get("ws") is None) == (action == "standardize"):
            raise ValueError(f"{where}: {action!r} with groups {groups!r} and ws {data.get('ws')!r}")
    if groups is not None and (not channels or channels % groups):
        raise ValueError(f"{where}: {groups} groups do not divide {channels} channels")


def must_be_options(data: Mapping[str, Any]) -> None:
    """Raise ValueError unless every option is known and of the right kind."""
    _must_hold(data, OPTIONS, "the options")


def _must_hold(data: Any, rules: Mapping[str, Rule], where: str) -> None:
    if not isinstance(data, Mapping):
        raise ValueError(f"{where} cannot be a {type(data).__name__}")
    for field, value in data.items():
        if field not in rules:
            raise ValueError(f"{where}: unknown field {field!r:.60}")
        if not rules[field](value):
            raise ValueError(f"{where}: {field} cannot be {value!r:.60}")


def must_be_inputs(spec: Any) -> None:
    """Raise ValueError unless the data is what `normswap.networks.inputs.describe` writes, and not too large."""
    if spec is not None and _elements(spec, MAX_DEPTH) > MAX_ELEMENTS:
        raise ValueError(f"the example inputs have more than {MAX_ELEMENTS} elements")


def _elements(spec: Any, depth: int) -> int:
    if not isinstance(spec, Mapping) or not spec or not depth:
        raise ValueError(f"an example input cannot be {spec!r:.60}")
    if "tensor" in spec:
        if set(spec) != {"tensor", "dtype"} or not _input_sizes(spec["tensor"]) or spec["dtype"] not in DTYPES:
            raise ValueError(f"an example input cannot be {spec!r:.60}")
        return math.prod(spec["tensor"])
    kind, items = next(iter(spec.items()))
    if (
        len(spec) != 1
        or not isinstance(items, dict if kind == "dict" else list)
        or kind not in ("dict", "list", "tuple")
    ):
        raise ValueError(f"an example input cannot be {spec!r:.60}")
    return sum(_elements(item, depth - 1) for item in (items.values() if isinstance(items, dict) else items))
