"""The command-line options that convert and inspect share."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from normswap.cli.models import Opening
from normswap.cli.output import given
from normswap.planning.choices import WS, Affine, Keep, Over, To
from normswap.planning.options import Wishes


class GroupCount(click.ParamType[int | str]):
    """A whole number or ``auto``."""

    name = "integer or auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        """Return the number, or ``"auto"``."""
        if isinstance(value, str) and value.lower() == "auto":
            return "auto"
        try:
            return int(click.INT.convert(value, param, ctx))
        except click.BadParameter as error:
            self.fail(f"{error.message.rstrip('.')}, nor auto.", param, ctx)


def _overrides(_context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, Any]:
    """Read GLOB:OPTION=VALUE; numbers become numbers."""
    result: dict[str, dict[str, int | str]] = {}
    for text in values:
        pattern, colon, setting = text.rpartition(":")
        option, equals, value = setting.partition("=")
        if not (pattern and colon and equals):
            raise click.BadParameter(f"{text!r} does not look like 'layer4.*:groups=8'")
        number = value.removeprefix("-").isdecimal()
        result.setdefault(pattern, {})[option.replace("-", "_")] = int(value) if number else value
    return result


OPTIONS = (
    click.option(
        "--groups",
        type=GroupCount(),
        default=32,
        show_default=True,
        metavar="N|auto",
        help="Largest group count; auto: per layer the one that keeps the function best.",
    ),
    click.option("--group-size", type=int, metavar="N", help="Channels per group, instead of --groups."),
    click.option(
        "--to",
        type=click.Choice([choice.value for choice in To], case_sensitive=False),
        default=To.GROUP.value,
        show_default=True,
        help="Groups of channels, one group (layer), one channel per group (instance), or the norm itself with the "
        "statistics it has (frozen).",
    ),
    click.option(
        "--over",
        type=click.Choice([choice.value for choice in Over]),
        default=Over.SAMPLE.value,
        show_default=True,
        help="What statistics are taken over: a sample's positions too, or the channels of each position alone.",
    ),
    click.option(
        "--ws",
        type=click.Choice([choice.value for choice in WS], case_sensitive=False),
        default=WS.AUTO.value,
        show_default=True,
        help="Weight standardization form.",
    ),
    click.option(
        "--affine",
        type=click.Choice([choice.value for choice in Affine], case_sensitive=False),
        default=Affine.MATCH.value,
        show_default=True,
        help="Match BatchNorm's function, or copy its affine part.",
    ),
    click.option(
        "--shrink",
        type=click.FloatRange(min=0),
        metavar="X",
        help="How far a norm draws a sample's variance towards the training one: its epsilon is X times that. "
        "Default 4, with --groups auto 60; behind filters that are not equalized 0.5 and 1.5.",
    ),
    click.option(
        "--equalize/--no-equalize",
        default=True,
        show_default=True,
        help="Give filters before norms the scale and sign with which samples' own statistics move the output least.",
    ),
    click.option(
        "--keep",
        type=click.Choice([choice.value for choice in Keep], case_sensitive=False),
        default=Keep.FROZEN.value,
        show_default=True,
        help="Norms that patterns leave alone: with the statistics they have, or live.",
    ),
    click.option("--include", multiple=True, metavar="GLOB", help="Touch only layers whose name matches."),
    click.option("--exclude", multiple=True, metavar="GLOB", help="Leave layers whose name matches alone."),
    click.option(
        "--override",
        "overrides",
        multiple=True,
        metavar="GLOB:OPTION=VALUE",
        callback=_overrides,
        help="Other options for some layers, as in 'layer4.*:groups=8'.",
    ),
    click.option(
        "--pretrained/--no-pretrained", default=True, show_default=True, help="Start from the registry's weights."
    ),
    click.option("--weights", type=click.Path(path_type=Path), metavar="FILE", help="Start from a checkpoint."),
    click.option(
        "--num-classes",
        type=click.IntRange(min=0),
        metavar="N",
        help="Outputs of the head, where not the usual ones.",
    ),
    click.option("--input", "shapes", multiple=True, metavar="SIZES", help="Shape of an input, as 2,3,64,64."),
    click.option(
        "--input-from",
        "example",
        metavar="SOURCE",
        help="Example input: package.module:function that returns a tensor, a tuple or a dict, or a file of tensors.",
    ),
)


report_option = click.option(
    "--report",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write a page to look at: every layer, the drift, the checks, in one HTML file.",
)
device_option = click.option("--device", metavar="NAME", help="Where to compute; default cuda where there is one.")
model_option = click.option(
    "--model", metavar="MODEL", help="The unconverted network, where DIRECTORY names none: package.module:factory."
)
example_option = click.option(
    "--input-from",
    "example",
    metavar="SOURCE",
    help="Example input, where DIRECTORY records none: package.module:function, or a file of tensors.",
)
OPENING = ("pretrained", "weights", "num_classes", "shapes", "example")


def conversion_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options that convert and inspect share.

    Those that tell how to open the model arrive as ``opening``; of the others only those arrive that were typed.
    """

    @wraps(function)
    def opened(
        pretrained: bool,
        weights: Path | None,
        num_classes: int | None,
        shapes: tuple[str, ...],
        example: str | None,
        **arguments: Any,
    ) -> None:
        wishes = {name: arguments.pop(name) for name in Wishes.__annotations__}
        typed = {name: wishes[name] for name in wishes if given([name])}
        all_typed = tuple(given([*wishes, *OPENING]))
        function(opening=Opening(pretrained, weights, num_classes, shapes, example, all_typed), **arguments, **typed)

    for option in reversed(OPTIONS):
        opened = option(opened)
    return opened
