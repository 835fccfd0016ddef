"""A checkpoint's folder: files that belong together, told by a digest, written and read as one."""

import errno
import getpass
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
from filelock import FileLock, Timeout
from torch import Tensor

from normswap.checkpoint.atomic import finish, left_over, locked, replacing_together
from normswap.errors import CheckpointError
from normswap.planning.schema import SCHEMA, unreadable
from normswap.sources.state_dicts import must_be_checkpoint
from normswap.sources.untrusted_json import parse_json, read_json

Parsed = TypeVar("Parsed")

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
ORDER = CONFIG, CARD, WEIGHTS
"""In which they are renamed: the one that tells the others apart first, the one that it tells apart last."""


def must_be_free(directory: Path) -> None:
    """Raise where a checkpoint would replace files, whoever wrote them.

    Raises:
        CheckpointError: With the file.
    """
    if os.path.exists(directory / CONFIG):
        raise CheckpointError(f"{directory}: holds a checkpoint already; pass --force or another -o")
    for name in (WEIGHTS, CARD):
        if os.path.exists(directory / name):
            raise CheckpointError(f"{directory / name}: would be replaced; pass --force or another -o")


def must_take_files(directory: Path) -> None:
    """Raise where a checkpoint cannot be written, as it turns out by making the folder and a file, for a moment.

    Raises:
        CheckpointError: With the reason.
    """
    try:
        with suppress(_Undone), _made(directory):
            if taken := next((name for name in ORDER if (directory / name).is_dir()), ""):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), taken)
            with tempfile.TemporaryFile(dir=directory):
                raise _Undone
    except OSError as error:
        raise unwritable(directory, error) from error


class _Undone(Exception):
    """What was made is to be taken away again."""


def unwritable(directory: Path, error: OSError) -> CheckpointError:
    """Return the error for a folder that cannot be written."""
    return CheckpointError(f"{directory}: cannot be written ({error.strerror or error}); choose another folder")


@contextmanager
def claimed(directory: Path) -> Iterator[None]:
    """Keep others on this machine from making a checkpoint for the same folder, from the start of the work on.

    Raises:
        CheckpointError: Another process is at it.
    """
    place = hashlib.sha256(os.path.realpath(directory).encode(errors="surrogateescape")).hexdigest()[:16]
    lock = FileLock(Path(tempfile.gettempdir()) / f"normswap-{getpass.getuser()}-{place}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise CheckpointError(
            f"{directory}: another process is making a checkpoint for it; wait for that, or pass another -o"
        ) from error
    try:
        yield
    finally:
        lock.release()


def write(
    directory: Path, tensors: dict[str, Tensor], config: dict[str, Any], card: str, *, replace: bool = True
) -> None:
    """Write a checkpoint in place of the one that is there.

    The configuration is renamed first: it names the digest of the tensors that belong to it, by which they are found
    where they were staged should the process be killed before they are renamed, too. The tensors' file carries the
    configuration, so that neither can be changed alone.

    Raises:
        OSError: The folder cannot be written; the old checkpoint is there.
        CheckpointError: There is one, and it is not to be replaced.
    """
    rest = {key: value for key, value in config.items() if key != "normswap"}
    metadata = {"format": "pt", "normswap": json.dumps(config["normswap"]), "timm": json.dumps(rest)}
    with (
        _made(directory),
        replacing_together([directory / name for name in ORDER]) as (configured, described, stored),
    ):
        if not replace:
            must_be_free(directory)
        try:
            safetensors.torch.save_file(tensors, stored, metadata=metadata)
        except safetensors.SafetensorError as error:  # which a full disk becomes there
            raise OSError(str(error)) from error
        config = {**config, "normswap": {**config["normswap"], "sha256": digest(stored)}}
        described.write_text(card, encoding="utf-8")
        configured.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


@contextmanager
def _made(directory: Path) -> Iterator[None]:
    """Make a folder; where the block fails, those that were made for it are taken away again."""
    missing = [folder for folder in (directory, *directory.parents) if not os.path.lexists(folder)]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()
        raise


@contextmanager
def whole(directory: Path, parse: Callable[[dict[str, Any]], Parsed]) -> Iterator[tuple[Parsed, Path]]:
    """Yield what the configuration says and the path of the tensors; nobody replaces them while the block lasts.

    Where a process was killed while it renamed the files of a checkpoint, this finishes what it began.

    Args:
        directory: The checkpoint's folder.
        parse: Makes of the configuration what is wanted of it, before the tensors are looked at.

    Raises:
        CheckpointError: A file is missing or damaged, or they were not saved together.
    """
    with _locked(directory, shared=True):
        config = read_config(directory)
        parsed = parse(config)
        if (directory / WEIGHTS).exists() and _belongs(directory / WEIGHTS, config):
            _must_agree(directory / WEIGHTS, config)
            yield parsed, directory / WEIGHTS
            return
    with _locked(directory) as alone:
        config = read_config(directory)
        yield parse(config), _found(directory, config, may_rename=alone)


def read_config(directory: Path) -> dict[str, Any]:
    """Return a checkpoint's configuration.

    Raises:
        CheckpointError: There is none, or it is not normswap's.
    """
    try:
        config = read_json(directory / CONFIG)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{directory}: holds no {CONFIG}; pass a folder that normswap wrote") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory / CONFIG}: cannot be read ({error}); save the checkpoint again") from error
    if not isinstance(config, dict) or not isinstance(config.get("normswap"), dict):
        raise CheckpointError(f"{directory / CONFIG}: is not normswap's; pass a folder that normswap wrote")
    if newer := unreadable(config["normswap"].get("schema", SCHEMA)):
        raise CheckpointError(f"{directory / CONFIG}: {newer}")
    return config


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _locked(directory: Path, **kind: bool) -> Any:
    """Lock a folder for reading; one that cannot be opened is no checkpoint."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: holds no {CONFIG}; pass a folder that normswap wrote")
    return locked(directory, **kind)


def _belongs(path: Path, config: Mapping[str, Any]) -> bool:
    try:
        return bool(digest(path) == config["normswap"].get("sha256"))
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); pass a folder that normswap wrote"
        ) from error


def _found(directory: Path, config: Mapping[str, Any], *, may_rename: bool) -> Path:
    """Return the file that holds the configuration's tensors: in its place, or where a killed process staged it."""
    path = directory / WEIGHTS
    candidates = [path] if path.exists() else []
    for candidate in (*candidates, *left_over(path)):
        if not _belongs(candidate, config):
            continue
        _must_agree(candidate, config)
        if candidate == path or not may_rename:
            return candidate
        try:
            finish(candidate, [directory / name for name in ORDER])
        except OSError:  # a folder that can only be read
            return candidate
        return path
    _belongs(path, config)
    must_be_checkpoint(path)
    raise CheckpointError(f"{path}: does not belong to {CONFIG} beside it; save the checkpoint again")


def _must_agree(path: Path, config: Mapping[str, Any]) -> None:
    """Raise unless the configuration is the one that the tensors' file carries."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        stored = parse_json(metadata["normswap"])
        rest = parse_json(metadata["timm"]) if "timm" in metadata else None
    except (safetensors.SafetensorError, KeyError, ValueError, OSError) as error:
        raise CheckpointError(f"{path}: is not normswap's ({error}); save the checkpoint again") from error
    block = {key: value for key, value in config["normswap"].items() if key != "sha256"}
    ours = {key: value for key, value in config.items() if key != "normswap"}
    if block != stored or (rest is not None and ours != rest):
        raise CheckpointError(
            f"{path}: was saved with another {CONFIG} than the one beside it; save the checkpoint again"
        )
