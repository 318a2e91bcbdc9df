"""Files that are written whole or not at all, whatever kills the process."""

import errno
import json
import os
import tempfile
from pathlib import Path
from typing import Any


def no_room(error: Exception) -> bool:
    """Whether a disk is full or a quota used up: not the fault of what was asked for."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)


def write_json(path: str | os.PathLike, obj: Any) -> None:
    """Write `obj` as JSON such that `path` holds either its old content or all of the new, whatever kills the process.

    NumPy scalars and arrays and paths are converted. Raises ValueError for NaN or infinity (not JSON) or unknown types,
    before anything is written.
    """
    try:
        text = json.dumps(obj, indent=2, allow_nan=False, default=to_json) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: cannot be written as JSON: {error}") from error
    _replace(Path(path), text.encode())


def write_bytes(path: str | os.PathLike, content: bytes, *, overwrite: bool = False) -> None:
    """Write a file whole or not at all. FileExistsError if it is there and not empty, unless `overwrite`."""
    path = Path(path)
    if not overwrite and path.exists() and path.stat().st_size:
        raise FileExistsError(f"{path} exists; pass overwrite=True to replace it")
    _replace(path, content)


def to_json(value: Any) -> Any:
    """What JSON has no type for, in one that it has: the `default` of `json.dumps`. TypeError for anything else."""
    if hasattr(value, "tolist"):  # numpy scalars and arrays
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{type(value).__name__} is no JSON type")


def _replace(path: Path, content: bytes) -> None:
    """Write `content` to a temporary file beside `path`, force it to disk, and rename it over `path`."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files private; a record should be as readable as others
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the rename itself must survive a power cut, too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
