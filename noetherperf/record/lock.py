"""One writing process at a time: a lock between processes that ends when its holder ends.

flock(2) on a file: the system releases it when the process ends, even by kill -9, so no stale lock remains. Forked
children (a DataLoader's workers) inherit open files and would keep the lock after their parent's end; so they close
them at once. The file is opened for reading: a file open for writing would keep an administrator from remounting its
disk read-only during training.
"""

import os
from errno import EBADF
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path
from typing import Self

Key = tuple[int, int]  # device and inode; one file opened twice would exclude itself

_held: dict[Key, "_Held"] = {}


class _Held:
    """An open, locked file, shared by `count` Lock objects of this process."""

    def __init__(self, key: Key, path: Path) -> None:
        self.key, self.count = key, 0
        try:
            self._file = _open_locked(path, os.O_RDONLY)
        except OSError as error:
            if error.errno != EBADF:
                raise
            self._file = _open_locked(path, os.O_RDWR)  # NFS grants exclusive locks only on files open for writing

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
    """Locks a file against other processes, until `release` or the end of this process.

    Several Locks of one process may hold the same file. Nothing is written to it. If the file cannot be opened, or the
    file system has no locks, nothing is locked and no error is raised.

    Args:
        path: The file.

    Raises:
        BlockingIOError: Another process holds the lock.
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
        """Unlock the file, unless another Lock of this process holds it. A second call does nothing."""
        if self._held is not None:
            self._held.count -= 1
            if self._held.count == 0:
                self._held.close()
        self._held = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def lock_record(path: Path) -> Lock:
    """Lock a record for this process.

    Raises:
        BlockingIOError: Another process writes to it.
    """
    try:
        return Lock(path / "initial" / "zarr.json")  # never replaced, unlike the files that change
    except BlockingIOError:
        raise BlockingIOError(
            f"path: another process is writing to the record {str(path)!r}; end it or close its Recorder, or record to "
            "another path"
        ) from None


def _leave_to_the_parent() -> None:
    for held in list(_held.values()):
        held.close()


os.register_at_fork(after_in_child=_leave_to_the_parent)
