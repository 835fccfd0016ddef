"""The verbs that send a checkpoint on: as one file for deployment, or to the hub."""

from pathlib import Path

import click

from normswap.cli.output import Output, verb

SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--to", type=click.Choice(list(SUFFIXES)), default="onnx", show_default=True, help="Format of the file.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), metavar="FILE", help="Default: DIRECTORY.onnx or .pt2."
)
@click.option(
    "--opset",
    type=click.IntRange(17, 23),
    default=21,
    show_default=True,
    help="ONNX operators; from 21 on GroupNorm is one of them.",
)
@click.option("--static", is_flag=True, help="Keep batch and spatial sizes fixed, for runtimes that compile for one.")
@verb
def export(out: Output, directory: Path, to: str, output: Path | None, opset: int, static: bool) -> None:
    """Write the checkpoint in DIRECTORY as one file that runs without normswap.

    Weight standardization is folded in. The file is run and compared with the network before it takes its place.
    """
    from normswap import load
    from normswap.exporting import export as export_model

    target = output or directory.with_name(directory.resolve().name + SUFFIXES[to])
    out.note("exporting …")
    exported = export_model(load(directory), target, to=to, opset=opset, static=static)
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
