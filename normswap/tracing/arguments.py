"""What to call a forward with, by the names and the types that its parameters have, around one main tensor."""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn

from normswap.tracing.stated import stated_main_input

POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)

TOKENS, NODES, EDGES = 16, 6, 2
"""Tokens of a made-up text, nodes of a made-up graph, and its edges for every node."""

LEVEL = 0.5
"""A made-up time or level of noise."""


class Meaning(StrEnum):
    """What a parameter is for."""

    DATA = "data"
    TOKENS = "tokens"
    EDGES = "edges"
    GRAPHS = "graphs"
    POINTS = "points"
    LENGTHS = "lengths"
    MASK = "mask"
    LEVEL = "level"
    NUMBER = "number"
    FLAG = "flag"


@dataclass(frozen=True)
class Argument:
    """A parameter of a forward that must be given.

    Attributes:
        name: Its name.
        meaning: What it is for, by its name and annotation.
    """

    name: str
    meaning: Meaning


def arguments(model: nn.Module) -> tuple[tuple[Argument, ...], bool]:
    """Return the arguments to make up, in order, and whether they are passed by keyword.

    Those are the required ones; else the one that the model says is its main input, or the first; and edges, without
    which no graph is one.
    """
    parameters = [p for p in inspect.signature(model.forward).parameters.values() if p.name != "self"]
    positional = [p for p in parameters if p.kind in POSITIONAL]
    needed = [p for p in positional if p.default is p.empty]
    main = stated_main_input(model)
    if not needed and (named := [p for p in parameters if p.name == main]):
        return (_argument(named[0]),), True
    needed = needed or positional[:1]
    needed += [p for p in positional[len(needed) :][:1] if meaning(p.name, p.annotation) is Meaning.EDGES]
    needed += [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    found = tuple(map(_argument, needed)) or (Argument("", Meaning.DATA),)
    return found, any(p.kind is p.KEYWORD_ONLY for p in needed)


def meaning(name: str, annotation: Any = inspect.Parameter.empty) -> Meaning:
    """Return what a parameter is for.

    >>> meaning("edge_index"), meaning("token_lengths"), meaning("x")
    (<Meaning.EDGES: 'edges'>, <Meaning.LENGTHS: 'lengths'>, <Meaning.DATA: 'data'>)
    """
    kind, name = str(getattr(annotation, "__name__", annotation)), name.lower()
    if kind in ("float", "int"):
        return Meaning.NUMBER
    if kind == "bool":
        return Meaning.FLAG
    for meant, exact, ends in (
        (Meaning.EDGES, ("edge_index", "edges", "adj_t"), ("edge_index",)),
        (Meaning.GRAPHS, ("batch", "batch_index", "batch_idx"), ()),
        (Meaning.POINTS, ("pos", "points_xyz", "coords"), ()),
        (Meaning.LENGTHS, ("lengths", "lens", "length", "seqlens"), ("_lengths", "_lens", "_length", "_len")),
        (Meaning.MASK, ("mask",), ("_mask",)),
        (Meaning.LEVEL, ("t", "time", "sigma", "noise_level"), ("timestep", "timesteps", "_sigma", "_level")),
        (Meaning.TOKENS, ("tokens", "text", "ids", "src_tokens"), ("_ids", "token_ids", "_tokens")),
    ):
        if name in exact or name.endswith(ends or ("\0",)):
            return meant
    return Meaning.DATA


def _argument(parameter: inspect.Parameter) -> Argument:
    return Argument(parameter.name, meaning(parameter.name, parameter.annotation))


def calls(wanted: tuple[Argument, ...], main: Tensor, by_keyword: bool) -> Iterator[Any]:
    """Yield calls around one main tensor: more than one where lengths may run over several axes or be shares.

    Whole numbers have values, for these matter: edges and tokens are 0, and lengths are those of an axis.
    """
    sides = list(dict.fromkeys(reversed(main.shape[1:]))) or [1]
    any_lengths = any(one.meaning is Meaning.LENGTHS for one in wanted)
    lengths: list[Tensor] = [torch.full((main.shape[0],), side) for side in sides] if any_lengths else []
    for length in [*lengths, torch.ones(main.shape[0])] if any_lengths else [torch.ones(0)]:
        made = [_made(one.meaning, main, length) for one in wanted]
        yield dict(zip((one.name for one in wanted), made, strict=True)) if by_keyword else tuple(made)


def _made(meant: Meaning, main: Tensor, length: Tensor) -> Any:
    count = main.shape[0]
    made = {
        Meaning.TOKENS: lambda: torch.zeros(count, TOKENS, dtype=torch.long),
        Meaning.EDGES: lambda: torch.zeros(2, count * EDGES, dtype=torch.long),
        Meaning.GRAPHS: lambda: torch.zeros(count, dtype=torch.long),
        Meaning.POINTS: lambda: torch.empty(count, 3, dtype=main.dtype, device="meta"),
        Meaning.LENGTHS: length.clone,
        Meaning.MASK: lambda: torch.ones(count, main.shape[-1], dtype=torch.bool),
        Meaning.LEVEL: lambda: torch.full((count,), LEVEL, dtype=main.dtype),
        Meaning.NUMBER: lambda: 1,
        Meaning.FLAG: lambda: False,
    }.get(meant)
    return main if made is None else made()
