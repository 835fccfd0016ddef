"""Open the model that a verb of the command line names; nothing heavy is imported before it does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from normswap import errors
from normswap.cli.output import Output

if TYPE_CHECKING:
    from torch import nn

    from normswap.sources.registry import Source


def open_named(
    out: Output, name: str, pretrained: bool, weights: Path | None, num_classes: int | None, shapes: tuple[str, ...],
    options: dict[str, Any],
) -> tuple[nn.Module, Source | None]:  # fmt: skip
    """Build the model a user named, with its source; where its weights cannot be had, show the plan before failing.

    The input shapes that the user gave are added to the conversion's options.
    """
    out.note("loading torch and timm …")
    from normswap.sources.opening import open_model, parse_shape

    options["example_input"] = tuple(parse_shape(shape) for shape in shapes) or None
    try:
        network, source = open_model(name, pretrained=pretrained and not weights, num_classes=num_classes)
    except errors.WeightsUnavailable as error:
        _show_what_would_happen(out, name, num_classes, options, error)
        raise
    if weights is not None:
        from normswap.sources.state_dicts import fill, read_state_dict

        fill(network, read_state_dict(weights, network.state_dict()), name=str(weights))
    kind = next((parameter.dtype for parameter in network.parameters() if parameter.is_floating_point()), None)
    if shapes and kind is not None:
        options["example_input"] = tuple(example.to(kind) for example in options["example_input"])
    return network, source


def _show_what_would_happen(
    out: Output, name: str, num_classes: int | None, options: dict[str, Any], error: errors.WeightsUnavailable
) -> None:
    from normswap import inspect as inspect_model
    from normswap.planning import report
    from normswap.sources.opening import open_model

    try:
        network, _ = open_model(name, pretrained=False, num_classes=num_classes)
    except errors.NormswapError:  # a hub name has no architecture either
        return
    plan = inspect_model(network, **options)
    error.partial = {"plan": plan.to_dict()}  # type: ignore[attr-defined]
    if not out.as_json and not out.quiet:
        click.echo("\n".join(["would convert:", *report.summary(plan)]))
