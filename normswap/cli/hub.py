"""The verb that sends a checkpoint to the hub."""

from pathlib import Path

import click

from normswap.cli.output import Output, verb


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
