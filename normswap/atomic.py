"""Replace a file as a whole: a reader sees the old one or the new one."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target` to write to; on success it takes the target's place.

    The new file has the old one's permissions, or those the umask gives; a symbolic link keeps pointing where it did.
    """
    target = Path(os.path.realpath(target))
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:  # some writers choose permissions of their own: note the usual ones
            mode = (target if target.exists() else temporary).stat().st_mode & 0o777
            file.flush()
        yield temporary
        temporary.chmod(mode)
        _sync(temporary)
        temporary.replace(target)
        _sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
