"""Replace files as a whole: a reader sees the old ones or the new ones, whatever is interrupted."""

import errno
import glob
import os
import secrets
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

if sys.platform != "win32":
    import fcntl


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target` to write to; on success it takes the target's place.

    The new file has the old one's permissions, or those the umask gives; a symbolic link keeps pointing where it did.
    """
    with _staging([target]) as files:
        yield files[0].path
        files[0].seal()
        files[0].rename()


@contextmanager
def replacing_together(targets: Sequence[Path]) -> Iterator[list[Path]]:
    """Yield a temporary path for each of the targets, files of one folder; on success they take the targets' places.

    All are complete on the disk before the first is renamed, and from that moment the new ones count: the first says
    which others belong to it, and `finish` renames those that a killed process left. One process at a time writes.
    """
    with locked(targets[0].parent) as alone, _staging(targets) as files:
        yield [file.path for file in files]
        for file in files:
            file.seal()
        waiting = files.copy()
        files.clear()  # what fails from here on must leave everything where `finish` finds it
        for file in waiting:
            file.rename()
        if alone:
            _sweep(targets)


def finish(left: Path, targets: Sequence[Path]) -> None:
    """Rename everything that was staged together with the file `left`; the folder must be locked."""
    token = left.parent.name.split(".")[-2]
    for target in targets:
        file = Staged(_temporary(target, token), target, 0)
        if file.path.exists():
            file.rename()
    _sweep(targets)


def left_over(target: Path) -> list[Path]:
    """Return the temporary files that were to take the target's place."""
    return [
        path for folder in _folders(target) if (path := folder / os.path.basename(os.path.realpath(target))).exists()
    ]


@contextmanager
def locked(directory: Path, *, shared: bool = False) -> Iterator[bool]:
    """Wait until nobody else writes to a folder; tell whether nobody else reads it either.

    The operating system takes the lock back from a process that ends. Windows and some network file systems have none.
    It is on the folder itself, and readers share it: filelock would leave a file there, and could not lock a folder
    that may only be read.
    """
    if sys.platform == "win32":
        yield False
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
            alone = not shared
        except OSError:
            alone = False
        yield alone
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class Staged:
    """A file that is written beside the one whose place it takes."""

    path: Path
    target: Path
    mode: int

    @classmethod
    def beside(cls, target: Path, token: str) -> Self:
        """Make the file; some writers choose permissions of their own, so the usual ones are noted here."""
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
        path = _temporary(target, token)
        path.parent.mkdir()
        with path.open("xb"):
            return cls(path, target, (target if target.exists() else path).stat().st_mode & 0o777)

    def seal(self) -> None:
        """Give the file its permissions and have it on the disk, contents and name."""
        self.path.chmod(self.mode)
        _sync(self.path)
        _sync(self.path.parent)
        _sync(self.path.parent.parent)

    def rename(self) -> None:
        """Put the file in its place."""
        target = Path(os.path.realpath(self.target))
        self.path.replace(target)
        _sync(target.parent)
        shutil.rmtree(self.path.parent)


@contextmanager
def _staging(targets: Sequence[Path]) -> Iterator[list[Staged]]:
    """Make a file beside each target, and remove those that are still listed at the end."""
    token, files = secrets.token_hex(4), list[Staged]()
    try:
        for target in targets:
            files.append(Staged.beside(target, token))
        yield files
    finally:
        for file in files:
            shutil.rmtree(file.path.parent, ignore_errors=True)


def _temporary(target: Path, token: str) -> Path:
    """Return a path in a folder of its own: some writers leave temporary files of theirs there when they are killed."""
    target = Path(os.path.realpath(target))
    return target.with_name(f".{target.name}.{token}.tmp") / target.name


def _folders(target: Path) -> list[Path]:
    target = Path(os.path.realpath(target))
    return sorted(target.parent.glob(f".{glob.escape(target.name)}.*.tmp"))


def _sweep(targets: Sequence[Path]) -> None:
    for target in targets:
        for folder in _folders(target):
            shutil.rmtree(folder, ignore_errors=True)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
