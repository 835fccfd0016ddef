"""The command line: the only file that turns errors into exit codes. Nothing heavy is imported before a verb runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from normswap import errors
from normswap.cli_hub import push
from normswap.cli_models import open_named
from normswap.output import FAILED, INTERRUPTED, Output, verb
from normswap.version import __version__

if TYPE_CHECKING:
    from torch import nn

    from normswap.plan import Plan

EPILOG = "Exit codes: 0 done, 1 failed or a check did not hold, 2 usage, 3 nothing to convert, 130 interrupted."


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, epilog=EPILOG)
@click.version_option(__version__, "-V", "--version", prog_name="normswap")
def cli() -> None:
    """Turn BatchNorm networks into GroupNorm + Weight Standardization networks that keep what they learned."""


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


def conversion_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options that convert and inspect share."""
    options = (
        click.option("--groups", type=int, default=32, show_default=True, metavar="N", help="Largest group count."),
        click.option("--group-size", type=int, metavar="N", help="Channels a group, instead of --groups."),
        click.option("--to", type=click.Choice(["group", "layer", "instance"]), default="group", show_default=True),
        click.option(
            "--ws", type=click.Choice(["auto", "adaptive", "standard", "none"]), default="auto", show_default=True,
            help="Weight standardization form.",
        ),
        click.option(
            "--affine", type=click.Choice(["match", "copy"]), default="match", show_default=True,
            help="Match BatchNorm's function, or copy its affine part.",
        ),
        click.option("--include", multiple=True, metavar="GLOB", help="Touch only layers whose name matches."),
        click.option("--exclude", multiple=True, metavar="GLOB", help="Leave layers whose name matches alone."),
        click.option(
            "--override", "overrides", multiple=True, metavar="GLOB:OPTION=VALUE", callback=_overrides,
            help="Other options for some layers, as in 'layer4.*:groups=8'.",
        ),
        click.option(
            "--pretrained/--no-pretrained", default=True, show_default=True, help="Start from the registry's weights."
        ),
        click.option("--weights", type=click.Path(path_type=Path), metavar="FILE", help="Start from a checkpoint."),
        click.option("--num-classes", type=int, metavar="N", help="Outputs of the head, where not the usual ones."),
        click.option("--input", "shapes", multiple=True, metavar="SIZES", help="Shape of an input, as 2,3,64,64."),
    )  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


@cli.command()
@click.argument("model")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="DIR", help="Folder; default MODEL-normswap.")
@click.option("--dry-run", is_flag=True, help="Show the plan, write nothing.")
@click.option("--force", is_flag=True, help="Replace an earlier checkpoint in DIR.")
@conversion_options
@verb
def convert(
    out: Output, model: str, output: Path | None, dry_run: bool, force: bool, pretrained: bool, weights: Path | None,
    num_classes: int | None, shapes: tuple[str, ...], **options: Any,
) -> None:  # fmt: skip
    """Convert MODEL, check the result and write a checkpoint.

    MODEL is a name of timm or torchvision (resnet50, timm/resnet50.a1_in1k, torchvision/vgg16_bn), a checkpoint in
    timm's format (hf-hub:user/name, local-dir:FOLDER), or a function of your own (package.module:factory).
    """
    from normswap.opening import folder_name
    from normswap.plan import Options, flat_overrides

    Options(**{**options, "overrides": flat_overrides(options["overrides"])})
    target = output or Path(folder_name(model))
    if not dry_run and not force and (target / "config.json").exists():
        raise errors.CheckpointError(f"{target}: holds a checkpoint already; pass --force or another -o")
    network, source = open_named(out, model, pretrained, weights, num_classes, shapes, options)
    if dry_run:
        _show_plan(out, network, options)
        return
    from normswap import check, plan_of, report, save
    from normswap import convert as convert_model

    out.note(f"converting {model} …")
    converted = convert_model(network, **options)
    plan = plan_of(converted)
    out.note("checking …")
    checks = check(converted, network)
    if checks:
        out.note("writing …")
        save(converted, target, source=source, checks=checks)
    text = "\n".join([*report.summary(plan), "", str(checks), "", f"wrote {target}" if checks else "wrote nothing"])
    saved = str(target) if checks else None
    out.result({"output": saved, "plan": plan.to_dict(), "checks": checks.to_dict()}, text)
    if not checks:
        raise errors.CheckFailed(f"{checks.failed[0].name}: {checks.failed[0].detail}; nothing was written")


@cli.command()
@click.argument("model")
@conversion_options
@verb
def inspect(
    out: Output, model: str, pretrained: bool, weights: Path | None, num_classes: int | None, shapes: tuple[str, ...],
    **options: Any,
) -> None:  # fmt: skip
    """Show what would happen to every norm and convolution of MODEL, or what happened in a converted folder."""
    if (Path(model) / "config.json").exists():
        from normswap.plan import as_plan

        plan = as_plan(Path(model) / "config.json")
        out.result({"plan": plan.to_dict()}, str(plan))
        return
    network, _ = open_named(out, model, pretrained, weights, num_classes, shapes, options)
    _show_plan(out, network, options)


@cli.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--against", metavar="MODEL", help="Compare module shapes and gradients with this model.")
@verb
def check(out: Output, directory: Path, against: str | None) -> None:
    """Rebuild the checkpoint in DIRECTORY and check that it behaves as promised."""
    from normswap import check as check_model
    from normswap import load
    from normswap.checkpoint import names_no_source

    original = None
    if against is not None:
        from normswap.opening import open_model

        original, _ = open_model(against, pretrained=False)
    converted = load(directory, model=original if names_no_source(directory) else None)
    checks = check_model(converted, original)
    out.result({"checks": checks.to_dict()}, str(checks))
    if not checks:
        raise errors.CheckFailed(f"{directory}: {checks.failed[0].name}: {checks.failed[0].detail}")


@cli.command(name="list")
@click.argument("pattern", default="*")
@verb
def list_models(out: Output, pattern: str) -> None:
    """List the models that can be built by name; PATTERN is a glob such as '*resnet*'."""
    from fnmatch import fnmatchcase

    from normswap import sources

    found = [f"{registry}/{name}" for registry in sources.REGISTRIES for name in sources.names(registry)]
    chosen = [name for name in found if fnmatchcase(name, pattern) or fnmatchcase(name.partition("/")[2], pattern)]
    if not chosen:
        raise errors.UnknownModel(f"no model matches {pattern!r}; quote the pattern, as in '*resnet*'")
    out.result({"models": chosen}, "\n".join(chosen))


@cli.command()
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE", help="Draw the curves (needs normswap[plot]).")
@verb
def demo(out: Output, plot: Path | None) -> None:
    """Convert a small trained network and fine-tune it at batch size 2, beside BatchNorm: a minute, no network."""
    from normswap import demo as demonstration

    result = demonstration.run(note=out.note)
    if plot is not None:
        demonstration.draw(result, plot)
    out.result(result.to_dict(), str(result))


cli.add_command(push)


def _show_plan(out: Output, network: nn.Module, options: dict[str, Any]) -> None:
    from normswap import inspect as inspect_model

    plan: Plan = inspect_model(network, **options)
    out.result({"plan": plan.to_dict()}, str(plan))
    if not plan.changes:
        raise errors.NothingToConvert(f"{type(network).__name__} holds no BatchNorm to convert")


def main() -> None:
    """Run the command line."""
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("normswap: interrupted; nothing was written half", err=True)
        sys.exit(INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.exit(FAILED)
