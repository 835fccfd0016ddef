"""The command line: the only file that turns errors into exit codes. Nothing heavy is imported before a verb runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from normswap import errors
from normswap.cli.delivery import export
from normswap.cli.hub import push
from normswap.cli.models import open_named
from normswap.cli.options import conversion_options
from normswap.cli.output import FAILED, INTERRUPTED, Output, UnwrittenResult, verb
from normswap.version import __version__

if TYPE_CHECKING:
    from torch import nn

    from normswap.calibration.calibration import Calibration
    from normswap.planning.plan import Plan

EPILOG = "Exit codes: 0 done, 1 failed or a check did not hold, 2 usage, 3 nothing to convert, 130 interrupted."


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, epilog=EPILOG)
@click.version_option(__version__, "-V", "--version", prog_name="normswap")
def cli() -> None:
    """Turn BatchNorm networks into GroupNorm + Weight Standardization networks that keep what they learned."""


@cli.command()
@click.argument("model")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="DIR", help="Folder; default MODEL-normswap.")
@click.option("--dry-run", is_flag=True, help="Show the plan, write nothing.")
@click.option("--force", is_flag=True, help="Replace an earlier checkpoint in DIR.")
@click.option(
    "--calibrate",
    "images",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Match the original on these images; no labels are needed.",
)
@click.option(
    "--steps",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="N",
    help="Then distill the original for N steps of 16 images.",
)
@conversion_options
@verb
def convert(
    out: Output, model: str, output: Path | None, dry_run: bool, force: bool, images: Path | None, steps: int,
    pretrained: bool, weights: Path | None, num_classes: int | None, shapes: tuple[str, ...], **options: Any,
) -> None:  # fmt: skip
    """Convert MODEL, check the result and write a checkpoint.

    MODEL is a name of timm or torchvision (resnet50, timm/resnet50.a1_in1k, torchvision/vgg16_bn), a checkpoint in
    timm's format (hf-hub:user/name, local-dir:FOLDER), or a function of your own (package.module:factory).
    """
    from normswap.planning.options import Options, flat_overrides
    from normswap.sources.opening import folder_name

    Options(**{**options, "overrides": flat_overrides(options["overrides"])})
    if steps and images is None:
        raise errors.InvalidOption("--steps distills on images; pass --calibrate DIR too")
    target = output or Path(folder_name(model))
    if not dry_run and not force:
        _must_be_free(target)
    network, source = open_named(out, model, pretrained, weights, num_classes, shapes, options)
    if dry_run:
        _show_plan(out, network, options)
        return
    from normswap import check, plan_of, save
    from normswap import convert as convert_model
    from normswap.planning import report

    out.note(f"converting {model} …")
    if images is not None and options["groups"] == "auto":
        options["batches"] = _first_images(images, network, options["example_input"])
    converted = convert_model(network, **options)
    plan = plan_of(converted)
    result = _calibrated(out, converted, network, images, steps) if images is not None else None
    out.note("checking …")
    checks = check(converted, network)
    if checks:
        out.note("writing …")
        save(converted, target, source=source, checks=checks)
    lines = [*report.summary(plan), *([str(result)] if result else []), "", str(checks), ""]
    text = "\n".join([*lines, f"wrote {target}" if checks else "wrote nothing"])
    data: dict[str, Any] = {"output": str(target) if checks else None, "plan": plan.to_dict()}
    data |= {"calibration": result.to_dict()} if result else {}
    out.result({**data, "checks": checks.to_dict()}, text)
    if not checks:
        raise errors.CheckFailed(f"{checks.failed[0].name}: {checks.failed[0].detail}; nothing was written")


@cli.command()
@click.argument("model")
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Draw where function is lost, layer by layer (needs normswap[plot]).",
)
@conversion_options
@verb
def inspect(
    out: Output, model: str, plot: Path | None, pretrained: bool, weights: Path | None, num_classes: int | None,
    shapes: tuple[str, ...], **options: Any,
) -> None:  # fmt: skip
    """Show what would happen to every norm and convolution of MODEL, or what happened in a converted folder."""
    if os.path.exists(os.path.join(model, "config.json")):
        from normswap.planning.plan import as_plan

        plan = as_plan(Path(model) / "config.json")
        out.result({"plan": plan.to_dict()}, str(plan))
    else:
        network, _ = open_named(out, model, pretrained, weights, num_classes, shapes, options)
        plan = _show_plan(out, network, options)
    if plot is not None:
        from normswap.plotting import draw_plan

        draw_plan(plan, plot)


@cli.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--against", metavar="MODEL", help="Compare module shapes and gradients with this model.")
@verb
def check(out: Output, directory: Path, against: str | None) -> None:
    """Rebuild the checkpoint in DIRECTORY and check that it behaves as promised."""
    from normswap import check as check_model
    from normswap import load
    from normswap.checkpoint.loading import names_no_source

    original = None
    if against is not None:
        from normswap.sources.opening import open_model

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

    from normswap.sources import registry as sources

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
    from normswap.demo import comparison as demonstration

    result = demonstration.run(note=out.note)
    if plot is not None:
        demonstration.draw(result, plot)
    out.result(result.to_dict(), str(result))


cli.add_command(export)
cli.add_command(push)


def _must_be_free(target: Path) -> None:
    """Refuse a folder with files of the names that a checkpoint has, whoever wrote them."""
    if os.path.exists(target / "config.json"):
        raise errors.CheckpointError(f"{target}: holds a checkpoint already; pass --force or another -o")
    for name in ("model.safetensors", "README.md"):
        if os.path.exists(target / name):
            raise errors.CheckpointError(f"{target / name}: would be replaced; pass --force or another -o")


def _first_images(folder: Path, network: nn.Module, example_input: Any) -> list[Any]:
    """Return a few batches, on which group counts are measured."""
    from itertools import islice

    from normswap import inspect as inspect_model
    from normswap.calibration.images import image_batches

    size = inspect_model(network, example_input=example_input).input_size
    return list(islice(image_batches(folder, network, size, augment=False)[0], 4))


def _calibrated(out: Output, converted: nn.Module, network: nn.Module, folder: Path, steps: int) -> Calibration:
    """Calibrate on a folder of images."""
    from normswap import plan_of
    from normswap.calibration.calibration import calibration
    from normswap.calibration.images import image_batches

    out.note("calibrating …")
    size = plan_of(converted).input_size
    learned, judged = image_batches(folder, network, size, augment=bool(steps))
    return calibration(converted, network, learned, steps=steps, held_back=judged)


def _show_plan(out: Output, network: nn.Module, options: dict[str, Any]) -> Plan:
    from normswap import inspect as inspect_model

    plan: Plan = inspect_model(network, **options)
    out.result({"plan": plan.to_dict()}, str(plan))
    if not plan.changes:
        raise errors.NothingToConvert(f"{type(network).__name__} holds no BatchNorm to convert")
    return plan


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
    except UnwrittenResult as error:
        click.echo(f"normswap: the result cannot be printed ({error}); print it elsewhere", err=True)
        sys.stdout = None  # what is left in its buffer has no place to go
        sys.exit(FAILED)
