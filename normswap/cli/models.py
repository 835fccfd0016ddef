"""Open the model that a verb of the command line names; nothing heavy is imported before it does."""

from __future__ import annotations

import ctypes
import math
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from normswap import errors
from normswap.cli.output import Output, command_line
from normswap.limits import MAX_ELEMENTS

if TYPE_CHECKING:
    from torch import Tensor, nn

    from normswap.planning.plan import Plan
    from normswap.sources.registry import Source

LARGE, BLOCK = 2**26, 2**20
"""Size of a network from which on memory counts more than a tenth of the time, and of what is given back."""

MMAP_THRESHOLD = -3
"""What glibc calls the size from which on blocks are the system's (``malloc.h``)."""


@dataclass(frozen=True)
class Opening:
    """How to open a model: with which weights and head, and what it is called with.

    Attributes:
        pretrained: Start from the registry's weights.
        weights: Start from this checkpoint instead.
        num_classes: Outputs of the head, where not the usual ones.
        shapes: Shapes of example inputs, as they were typed.
        example: Where an example input is from: a function or a file.
        typed: What of the options for opening and converting was typed.
    """

    pretrained: bool
    weights: Path | None
    num_classes: int | None
    shapes: tuple[str, ...]
    example: str | None
    typed: tuple[str, ...]

    def origin(self, source: Source | None) -> Literal["pretrained", "random", "file"] | None:
        """Return whose the weights are; None where a function of the user's chose them."""
        if self.weights is not None:
            return "file"
        if source is None:
            return None
        return "pretrained" if self.pretrained else "random"


def open_named(
    out: Output, name: str, opening: Opening, options: dict[str, Any]
) -> tuple[nn.Module, Source | None, Any]:
    """Build the model a user named; where its weights cannot be had, show the plan before failing.

    Args:
        out: Where to say what is going on.
        name: As `normswap.sources.opening.open_model` reads it.
        opening: How to open it.
        options: Of the conversion, for the plan.

    Returns:
        The network, its source, and the example input that the user gave.
    """
    if opening.shapes and opening.example:
        raise errors.InvalidOption("--input and --input-from both say what the network takes; leave one of them out")
    from normswap.sources.opening import open_model, open_with_weights

    shapes, given = tuple(map(parse_shape, opening.shapes)) or None, opening.weights
    if given is not None:
        from normswap.sources.state_dicts import must_be_checkpoint

        must_be_checkpoint(given)
    example = example_from(opening.example) if opening.example else shapes
    try:
        if given is None:
            network, source = open_model(name, pretrained=opening.pretrained, num_classes=opening.num_classes)
        else:
            network, source = open_with_weights(name, given, num_classes=opening.num_classes)
    except errors.WeightsUnavailable:
        _show_what_would_happen(out, name, opening, example, options)
        raise
    spare_memory(network)
    kind = next((parameter.dtype for parameter in network.parameters() if parameter.is_floating_point()), None)
    if shapes is not None and kind is not None:
        example = tuple(tensor.to(kind) for tensor in shapes)
    return network, source, example


def spare_memory(network: nn.Module) -> None:
    """Have the C library give blocks back once they are free: between those it keeps, large filters find no room."""
    if sum(parameter.nbytes for parameter in network.parameters()) > LARGE:
        with suppress(AttributeError, OSError, TypeError):  # one that is not glibc
            ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, BLOCK)


def example_from(name: str) -> Any:
    """Return the example input that a function or a file gives."""
    from normswap.sources.example_inputs import read_example

    return read_example(name)


def unconverted(name: str | None) -> nn.Module | None:
    """Return the network that a checkpoint was converted from, by name; its weights are those of the checkpoint."""
    if name is None:
        return None
    from normswap.sources.opening import open_model

    return open_model(name, pretrained=False)[0]


def show_plan(
    out: Output, network: nn.Module, example_input: Any, options: dict[str, Any], *, name: str, report: Path | None
) -> Plan:
    """Print what would happen to a network, and write a page of it where one is asked for.

    Raises:
        NothingToConvert: Nothing would.
    """
    from normswap.conversion.pipeline import inspect, nothing_to_convert

    plan = inspect(network, example_input=example_input, **options)
    out.result({"plan": plan.to_dict()}, plan)
    if report is not None:
        plan.report(report, title=name, command=command_line())
    if not plan.converts:
        raise nothing_to_convert(type(network).__name__, plan)
    return plan


def parse_shape(text: str) -> Tensor:
    """Return a meta tensor of the shape that ``2,3,64,64`` describes.

    Raises:
        InvalidOption: It is no list of positive whole numbers.
    """
    import torch

    try:
        sizes = [int(size) for size in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise errors.InvalidOption(f"--input {text!r} is no shape; write sizes as in 2,3,64,64")
    if math.prod(sizes) > MAX_ELEMENTS:
        raise errors.InvalidOption(f"--input {text!r} has more than {MAX_ELEMENTS} elements; write a smaller shape")
    return torch.empty(sizes, device="meta")


def folder_name(model: str) -> str:
    """Return the name of the folder that a model's checkpoint goes to when the user gives none."""
    from normswap.sources.hub import HUB
    from normswap.sources.opening import FOLDER

    last = Path(model.removeprefix(FOLDER)).name if model.startswith(FOLDER) else model.removeprefix(HUB)
    return re.sub(r"[^\w.]+", "-", last) + "-normswap"


def _show_what_would_happen(
    out: Output,
    name: str,
    opening: Opening,
    example_input: Any,
    options: dict[str, Any],
) -> None:
    from normswap.conversion.pipeline import inspect
    from normswap.planning.report import summary
    from normswap.sources.opening import open_model

    try:
        network, _ = open_model(name, pretrained=False, num_classes=opening.num_classes)
    except errors.NormswapError:  # a hub name has no architecture either
        return
    plan = inspect(network, example_input=example_input, **options)
    out.result({"plan": plan.to_dict()}, "\n".join(["would convert:", *summary(plan.entries, plan.warnings)]))
