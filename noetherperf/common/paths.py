"""Paths as a user writes them: `~` is expanded, and a URL is refused."""

import os
import re
from pathlib import Path

__all__ = ["local_path"]

# pathlib removes one of the two slashes, so a URL that became a Path is recognised by the schemes in use.
_URL = re.compile(
    r"(?:[\w+.-]+::)*(?:[a-z][a-z\d+.-]*://"
    r"|(?:s3a?|gc?s|az|abfss?|adl|wasbs?|oci|r2|hf|https?|ftp|sftp|ssh|hdfs|dbfs|file|memory|zip|local):/)",
    re.IGNORECASE,
)


def local_path(path: str | bytes | os.PathLike[str] | os.PathLike[bytes], option: str = "path") -> Path:
    """The path of a file or directory of this machine, which need not exist.

    Args:
        path: The user's path; a leading `~` or `~user` stands for a home directory.
        option: The name of the argument or option, for the error message.

    Raises:
        ValueError: The path is empty, a URL, or in the home of an unknown user.
    """
    text = os.fsdecode(path)
    if not text:
        raise ValueError(f"{option}: is empty; name a directory ('.' is the present one)")
    if _URL.match(text):
        raise ValueError(
            f"{option}: {text!r} is a URL, but files are read and written in local directories only; write there, and "
            "copy the directory to where the URL points (of a file:// URL, give the path alone)"
        )
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(
            f"{option}: {text!r} cannot be followed ({error}); write './{text}' if '~' is part of a name"
        ) from error
