"""Whether a file can be written where it is asked for, told before the work begins and not after it."""

import os
from pathlib import Path

from normswap.errors import InvalidOption


def must_be_writable(path: Path, option: str) -> None:
    """Raise where a file cannot be written; what is there stays as it is.

    Args:
        path: The file.
        option: What asks for it, for the message.

    Raises:
        InvalidOption: With the file and why not.
    """
    if not path.parent.is_dir():
        raise InvalidOption(f"{option} {path}: there is no folder {path.parent}; make it first")
    existed = os.path.lexists(path)
    try:
        with open(path, "ab"):
            pass
    except OSError as error:
        raise InvalidOption(f"{option} {path}: {error.strerror}; write it elsewhere") from error
    if not existed:
        path.unlink()
