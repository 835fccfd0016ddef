"""Look at the zip archive that torch.save writes before torch reads it: its checksums, which torch skips, and sizes."""

import zipfile
from pathlib import Path

from normswap.errors import CheckpointError

INFLATION = 8
"""How many times its own size an archive may unpack to; torch.save does not compress."""
SLACK = 2**24
FOLDER = 0x10
"""MS-DOS' mark of a folder: torch does not read the contents, and gives whatever lay in memory."""


def must_be_sound(path: Path) -> None:
    """Raise unless an archive's records are those it was written with; torch can leave checksums out, as zeros.

    Raises:
        CheckpointError: A record is damaged, or unpacks to far more than the file's size.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            _must_hold_a_pickle(path, archive.namelist())
            if sum(record.file_size for record in records) > INFLATION * path.stat().st_size + SLACK:
                raise CheckpointError(f"{path}: unpacks to many times its size; save the tensors with torch.save")
            if any(record.external_attr & FOLDER and record.file_size for record in records):
                raise CheckpointError(f"{path}: is damaged (a tensor is marked as a folder); get a fresh copy")
            wrong = archive.testzip() if any(record.CRC for record in records) else None
    except CheckpointError:
        raise
    except Exception as error:  # a damaged archive fails in as many ways as zipfile has parts
        raise CheckpointError(f"{path}: is truncated or no checkpoint; get a fresh copy") from error
    if wrong is not None:
        raise CheckpointError(f"{path}: is damaged ({wrong!a:.100} does not match its checksum); get a fresh copy")


def is_uncompressed(path: Path) -> bool:
    """Tell whether an archive's records are in it as they are, so that they can be mapped; torch.save's are."""
    with zipfile.ZipFile(path) as archive:
        return all(record.compress_type == zipfile.ZIP_STORED for record in archive.infolist())


def _must_hold_a_pickle(path: Path, names: list[str]) -> None:
    if any(name.rpartition("/")[2] == "data.pkl" for name in names):
        return
    program = any(name.rpartition("/")[2] == "archive_format" for name in names)
    what = "a program that torch.export.save wrote" if program else "a zip archive that torch.save did not write"
    raise CheckpointError(f"{path}: is {what}; save model.state_dict() of the Python model and pass that")
