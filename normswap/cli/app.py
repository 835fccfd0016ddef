"""The command line: its verbs. Nothing heavy is imported before one of them runs."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from normswap import errors
from normswap.cli.delivery import export, push
from normswap.cli.models import Opening, example_from, folder_name, open_named, show_plan, spare_memory, unconverted
from normswap.cli.options import conversion_options, device_option, example_option, model_option, report_option
from normswap.cli.output import Output, Verbs, command_line, given, verb
from normswap.version import __version__

EPILOG = "Exit codes: 0 done, 1 failed or a check did not hold, 2 usage, 3 nothing to convert, 130 interrupted."


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
    for typed in given(["steps", "workers"]):
        if images is None:
            raise errors.InvalidOption(f"{typed} is for images; pass --calibrate DIR too")
    for typed in given(["made_up"]):
        if images is not None:
            raise errors.InvalidOption(f"{typed} is for want of images, and --calibrate gives some; leave one out")
    for typed in given(["images"]):
        if dry_run:
            raise errors.InvalidOption(f"--dry-run shows the plan that is made without images; leave {typed} out")
    target = output or Path(folder_name(model))
    if report is not None:
        from normswap.writing import must_be_writable

        if target.resolve() in report.resolve().parents:
            raise errors.InvalidOption(f"--report {report}: {target} is for the checkpoint alone; write it elsewhere")
        must_be_writable(report, "--report")
    out.note("loading torch and timm …")
    from normswap.networks.processes import device_named, first_process, rank, torchrun

    chosen = device_named(device)
    if dry_run:
        network, _, example_input = open_named(out, model, opening, options)
        show_plan(out, network, example_input, options, name=model, report=report)
        return
    from normswap.calibration.images import must_be_folder
    from normswap.checkpoint.folder import claimed, must_be_free, must_take_files
    from normswap.checkpoint.making import make
    from normswap.networks.validation import must_have_data

    if not force:
        must_be_free(target)
    must_take_files(target)
    if images is not None:
        must_be_folder(images)
    with claimed(target) if first_process() else nullcontext():
        network, source, example_input = open_named(out, model, opening, options)
        must_have_data(network)
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
                weights=opening.origin(source),
                replace=force,
                example_input=example_input,
                note=out.note,
                **options,
            )
            if rank() == 0:
                if report is not None:
                    made.plan.report(report, title=model, command=command_line(), checks=made.checks)
                out.result(made.to_dict(), made)
    if made.directory is None:
        failed = made.checks.failed[0]
        raise errors.CheckFailed(f"{failed.name}: {failed.detail}; nothing was written")


@cli.command()
@click.argument("model")
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Draw where function is lost, layer by layer (needs matplotlib).",
)
@report_option
@conversion_options
@verb
def inspect(out: Output, model: str, plot: Path | None, report: Path | None, opening: Opening, **options: Any) -> None:
    """Show what would happen to every norm and convolution of MODEL, or what happened in a converted folder.

    The drift of a norm is how far a sample's own statistics can be expected to move its output, relative to how much
    the samples differ: 0 moves nothing, 1 as much as they differ.
    """
    if plot is not None:
        from normswap.plotting import must_be_drawable

        must_be_drawable(plot)
    if report is not None:
        from normswap.writing import must_be_writable

        must_be_writable(report, "--report")
    if (Path(model) / "config.json").exists():
        from normswap.planning.plan import as_plan

        if opening.typed:
            raise errors.InvalidOption(
                f"{model} is converted, and {opening.typed[0]} is for what is not; leave it out, or name the original"
            )
        plan = as_plan(Path(model) / "config.json")
        out.result({"plan": plan.to_dict()}, plan)
        if report is not None:
            plan.report(report, title=model, command=command_line())
    else:
        out.note("loading torch and timm …")
        network, _, example_input = open_named(out, model, opening, options)
        plan = show_plan(out, network, example_input, options, name=model, report=report)
    if plot is not None:
        from normswap.plotting import draw_plan

        draw_plan(plan, plot, title=model)


@cli.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--against", metavar="MODEL", help="Compare module shapes and gradients with this model.")
@model_option
@example_option
@device_option
@verb
def check(
    out: Output, directory: Path, against: str | None, model: str | None, example: str | None, device: str | None
) -> None:
    """Rebuild the checkpoint in DIRECTORY and check that it behaves as promised."""
    from normswap import check as check_model
    from normswap import load
    from normswap.checkpoint.loading import names_no_source
    from normswap.networks.processes import device_named

    chosen, nameless = device_named(device), names_no_source(directory)
    given_input = None if example is None else example_from(example)
    original, own = unconverted(against), unconverted(model)
    converted = load(directory, model=own or (original if nameless else None))
    spare_memory(converted)
    compared = None if original is None else original.to(chosen)
    checks = check_model(converted.to(chosen), compared, example_input=given_input)
    out.result({"checks": checks.to_dict()}, checks)
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
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE", help="Draw the curves (needs matplotlib).")
@verb
def demo(out: Output, plot: Path | None) -> None:
    """Convert a small trained network and fine-tune it one image at a time, beside BatchNorm: a minute, no network."""
    from normswap.demo import comparison as demonstration

    if plot is not None:
        from normswap.plotting import must_be_drawable

        must_be_drawable(plot)
    result = demonstration.run(note=out.note)
    out.result(result.to_dict(), result)
    if plot is not None:
        demonstration.draw(result, plot)


cli.add_command(export)
cli.add_command(push)


def main() -> None:
    """Run the command line."""
    cli()
