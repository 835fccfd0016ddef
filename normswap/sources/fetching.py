"""Fetch a checkpoint from the Hugging Face hub by its name."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download

from normswap.errors import CheckpointError

HUB = "hf-hub:"
"""What the name of a checkpoint on the hub begins with, as timm writes it."""


def fetch(name: str, files: Sequence[str]) -> Path:
    """Return the folder, in the hub's cache, with these files of the checkpoint ``hf-hub:user/name[@revision]``.

    Raises:
        CheckpointError: There is none, or the hub does not answer.
    """
    repository, _, revision = name.removeprefix(HUB).partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(files)))
    except Exception as error:  # besides its own the hub's client raises those of the HTTP library it happens to use
        raise CheckpointError(f"{name}: {first_line(error)}; check the name and the network") from error


def first_line(error: BaseException) -> str:
    """Return what an error says first; those of the hub go on for many lines."""
    return str(error).strip().split("\n")[0]
