"""Paths as a user writes them: `~` is their home, and what names no directory of this machine is refused."""

import os
import re
from pathlib import Path

__all__ = ["local_path"]

# pathlib takes one of the two slashes away, so what came as a Path is known by the schemes that are in use.
_URL = re.compile(
    r"(?:[\w+.-]+::)*(?:[a-z][a-z\d+.-]*://"
    r"|(?:s3a?|gc?s|az|abfss?|adl|wasbs?|oci|r2|hf|https?|ftp|sftp|ssh|hdfs|dbfs|file|memory|zip|local):/)",
    re.IGNORECASE,
)


def local_path(path: str | bytes | os.PathLike[str] | os.PathLike[bytes], option: str = "path") -> Path:
    """The absolute path of a file or directory, links resolved; it need not exist.

    Args:
        path: As it was given; `~` and `~user` stand for home directories.
        option: What it was given as, for the error's text.

    Raises:
        ValueError: It is empty, a URL, or the home of nobody.
    """
    text = os.fsdecode(path)
    if not text:
        raise ValueError(f"{option}: is empty; name a directory ('.' is the present one)")
    if _URL.match(text):
        raise ValueError(
            f"{option}: {text!r} is a URL, but files are written to local directories only; write there, and copy the "
            "directory to where the URL points (of a file:// URL, give the path alone)"
        )
    try:
        return Path(text).expanduser().resolve()
    except RuntimeError as error:  # no such user; or links that lead in a circle
        raise ValueError(
            f"{option}: {text!r} cannot be followed ({error}); a name that begins with '~' is written './~...'"
        ) from error
