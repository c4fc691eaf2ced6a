"""One process at a time: a lock that other processes see, and that ends with its holder, however the holder ends.

flock(2) on a file: the system drops it when the process is gone, kill -9 included, so nothing stale is left to clean
up. Forked children (a DataLoader's workers) inherit open files and would keep the lock alive after their parent; they
close them first thing. The file is open to be read, for one open to be written to would keep an administrator from
turning its disk read-only while training goes on.
"""

import os
from errno import EBADF
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path
from typing import Self

__all__ = ["Lock"]


Key = tuple[int, int]  # device and inode; one file opened twice would exclude itself

_held: dict[Key, "_Held"] = {}


class _Held:
    """An open, locked file, and how many Lock objects of this process share it."""

    def __init__(self, key: Key, path: Path) -> None:
        self.key, self.count = key, 0
        try:
            self._file = _open_locked(path, os.O_RDONLY)
        except OSError as error:
            if error.errno != EBADF:
                raise
            self._file = _open_locked(path, os.O_RDWR)  # NFS locks for itself alone what is open to be written to

    def close(self) -> None:
        if _held.pop(self.key, None) is self:
            os.close(self._file)


def _open_locked(path: Path, mode: int) -> int:
    file = os.open(path, mode | os.O_CLOEXEC)
    try:
        flock(file, LOCK_EX | LOCK_NB)
    except OSError:
        os.close(file)
        raise
    return file


class Lock:
    """Holds a file against other processes from now on, until `release` or the end of this process.

    Within one process it may be held many times. Nothing is written to the file. Where it cannot be opened, or the
    file system knows no locks, nothing is held and all goes on.

    Args:
        path: The file.

    Raises:
        BlockingIOError: Another process holds it.
    """

    def __init__(self, path: Path) -> None:
        self._held: _Held | None = None
        try:
            stat = path.stat()
            key = stat.st_dev, stat.st_ino
            if key not in _held:
                _held[key] = _Held(key, path)
        except BlockingIOError:
            raise
        except OSError:
            return
        self._held = _held[key]
        self._held.count += 1

    def release(self) -> None:
        """Let others have it, unless this process holds it once more. A second call does nothing."""
        if self._held is not None:
            self._held.count -= 1
            if self._held.count == 0:
                self._held.close()
        self._held = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _leave_to_the_parent() -> None:
    for held in list(_held.values()):
        held.close()


os.register_at_fork(after_in_child=_leave_to_the_parent)
