"""The command line: the only file that turns errors into exit codes. Nothing heavy is imported before a verb runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from normswap import errors
from normswap.cli.delivery import export, push
from normswap.cli.models import Opening, folder_name, open_named, show_plan
from normswap.cli.options import conversion_options, device_option, report_option
from normswap.cli.output import FAILED, INTERRUPTED, TYPED, Output, UnwrittenResult, command_line, verb
from normswap.version import __version__

EPILOG = "Exit codes: 0 done, 1 failed or a check did not hold, 2 usage, 3 nothing to convert, 130 interrupted."


class Verbs(click.Group):
    """Verbs that can say what was typed."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keep the words before they are taken apart."""
        ctx.meta[TYPED] = tuple(args)
        return super().parse_args(ctx, args)


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]}, epilog=EPILOG)
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
@click.option(
    "--workers",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="N",
    help="Processes that read images.",
)
@device_option
@click.option(
    "--synthetic/--no-synthetic",
    "made_up",
    default=True,
    show_default=True,
    help="Without --calibrate, equalize a trained network on made-up images: seconds, no data of anybody.",
)
@report_option
@conversion_options
@verb
def convert(
    out: Output,
    model: str,
    output: Path | None,
    dry_run: bool,
    force: bool,
    images: Path | None,
    steps: int,
    workers: int,
    device: str | None,
    made_up: bool,
    report: Path | None,
    opening: Opening,
    **options: Any,
) -> None:
    """Convert MODEL, check the result and write a checkpoint.

    MODEL is a name of timm or torchvision (resnet50, timm/resnet50.a1_in1k, torchvision/vgg16_bn), a checkpoint in
    timm's format (hf-hub:user/name, local-dir:FOLDER), or a function of your own (package.module:factory).

    Under torchrun all processes calibrate together.
    """
    from normswap.planning.options import Options

    Options.of(**options)
    if steps and images is None:
        raise errors.InvalidOption("--steps distills on images; pass --calibrate DIR too")
    target = output or Path(folder_name(model))
    if report is not None:
        from normswap.writing import must_be_writable

        if target.resolve() in report.resolve().parents:
            raise errors.InvalidOption(f"--report {report}: {target} is for the checkpoint alone; write it elsewhere")
        must_be_writable(report, "--report")
    if not dry_run and not force:
        from normswap.checkpoint.folder import must_be_free

        must_be_free(target)
    out.note("loading torch and timm …")
    from normswap.networks.processes import device_named, rank, torchrun

    chosen = device_named(device)
    network, source, example_input = open_named(out, model, opening, options)
    if dry_run:
        show_plan(out, network, example_input, options, name=model, report=report)
        return
    from normswap.checkpoint.making import make

    out.note(f"converting {model} …")
    with torchrun(chosen):
        made = make(
            network.to(chosen),
            target,
            source=source,
            images=images,
            steps=steps,
            workers=workers,
            made_up=made_up,
            example_input=example_input,
            note=out.note,
            **options,
        )
        if rank() == 0:
            if report is not None:
                made.plan.report(report, title=model, command=command_line(), checks=made.checks)
            out.result(made.to_dict(), str(made))
    if made.directory is None:
        failed = made.checks.failed[0]
        raise errors.CheckFailed(f"{failed.name}: {failed.detail}; nothing was written")


@cli.command()
@click.argument("model")
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Draw where function is lost, layer by layer (needs normswap[plot]).",
)
@report_option
@conversion_options
@verb
def inspect(out: Output, model: str, plot: Path | None, report: Path | None, opening: Opening, **options: Any) -> None:
    """Show what would happen to every norm and convolution of MODEL, or what happened in a converted folder.

    The drift of a norm is how far a sample's own statistics can be expected to move its output, relative to how much
    the samples differ: 0 moves nothing, 1 as much as they differ.
    """
    from normswap.plotting import must_draw
    from normswap.writing import must_be_writable

    if plot is not None:
        must_draw(plot)
        must_be_writable(plot, "--plot")
    if report is not None:
        must_be_writable(report, "--report")
    if os.path.exists(os.path.join(model, "config.json")):
        from normswap.planning.plan import as_plan

        plan = as_plan(Path(model) / "config.json")
        out.result({"plan": plan.to_dict()}, str(plan))
        if report is not None:
            plan.report(report, title=model, command=command_line())
    else:
        network, _, example_input = open_named(out, model, opening, options)
        plan = show_plan(out, network, example_input, options, name=model, report=report)
    if plot is not None:
        from normswap.plotting import draw_plan

        draw_plan(plan, plot, title=model)


@cli.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--against", metavar="MODEL", help="Compare module shapes and gradients with this model.")
@device_option
@verb
def check(out: Output, directory: Path, against: str | None, device: str | None) -> None:
    """Rebuild the checkpoint in DIRECTORY and check that it behaves as promised."""
    from normswap import check as check_model
    from normswap import load
    from normswap.checkpoint.loading import names_no_source
    from normswap.networks.processes import device_named

    original = None
    if against is not None:
        from normswap.sources.opening import open_model

        original, _ = open_model(against, pretrained=False)
    converted = load(directory, model=original if names_no_source(directory) else None)
    chosen = device_named(device)
    checks = check_model(converted.to(chosen), None if original is None else original.to(chosen))
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
    """Convert a small trained network and fine-tune it one image at a time, beside BatchNorm: a minute, no network."""
    from normswap.plotting import must_draw
    from normswap.writing import must_be_writable

    if plot is not None:
        must_draw(plot)
        must_be_writable(plot, "--plot")
    from normswap.demo import comparison as demonstration

    result = demonstration.run(note=out.note)
    if plot is not None:
        demonstration.draw(result, plot)
    out.result(result.to_dict(), str(result))


cli.add_command(export)
cli.add_command(push)


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
