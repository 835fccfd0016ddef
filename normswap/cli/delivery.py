"""The verbs that send a checkpoint on: as one file for deployment, or to the hub."""

from pathlib import Path

import click

from normswap.cli.models import example_from, unconverted
from normswap.cli.options import example_option, model_option
from normswap.cli.output import Output, verb
from normswap.errors import ExportFailed

SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--to",
    type=click.Choice(list(SUFFIXES), case_sensitive=False),
    default="onnx",
    show_default=True,
    help="Format of the file.",
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), metavar="FILE", help="Default: DIRECTORY.onnx or .pt2."
)
@click.option("--force", is_flag=True, help="Replace the file.")
@click.option(
    "--opset",
    type=click.IntRange(17, 23),
    help="ONNX operators, 21 by default; from there on GroupNorm is one of them.",
)
@click.option("--static", is_flag=True, help="Keep batch and spatial sizes fixed, for runtimes that compile for one.")
@model_option
@example_option
@verb
def export(
    out: Output,
    directory: Path,
    to: str,
    output: Path | None,
    force: bool,
    opset: int | None,
    static: bool,
    model: str | None,
    example: str | None,
) -> None:
    """Write the checkpoint in DIRECTORY as one file that runs without normswap.

    Weight standardization is folded in. The file is run and compared with the network before it takes its place.
    """
    target = output or directory.with_name(directory.resolve().name + SUFFIXES[to])
    if target.is_file() and not force:
        raise ExportFailed(f"{target}: would be replaced; pass --force or another -o")
    from normswap import load
    from normswap.checkpoint.folder import read_config
    from normswap.exporting import export as export_model
    from normswap.exporting import must_be_exportable

    must_be_exportable(target, to, opset)
    read_config(directory)
    given_input = None if example is None else example_from(example)
    out.note("exporting …")
    network = load(directory, model=unconverted(model))
    exported = export_model(network, target, to=to, opset=opset, static=static, example_input=given_input)
    out.result(exported.to_dict(), str(exported))


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("repository", metavar="USER/NAME")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--dry-run", is_flag=True, help="Show the files and the model card, send nothing.")
@verb
def push(out: Output, directory: Path, repository: str, private: bool, dry_run: bool) -> None:
    """Upload the checkpoint in DIRECTORY to the Hugging Face hub, with a model card.

    HF_TOKEN and HF_ENDPOINT are read as by every tool of the hub.
    """
    from normswap.checkpoint.hub_upload import push as push_checkpoint

    out.note("uploading …")
    upload = push_checkpoint(directory, repository, private=private, dry_run=dry_run)
    text = f"{upload.card}\n{upload}" if dry_run else str(upload)
    out.result({**upload.to_dict(), **({"card": upload.card} if dry_run else {})}, text)
