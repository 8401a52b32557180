"""Files appear whole: written to a temporary name beside the target, then renamed."""

import math
import os
import tempfile
from pathlib import Path
from typing import IO, Any


def lock_folder(folder: Path) -> IO[str]:
    """Hold a folder for this process until the returned file is closed.

    Raises:
        ValueError: another process holds it.
    """
    import fcntl

    file = (folder / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(f"{folder} is in use by another process") from None
    return file


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader, or a crash, never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes private files; this one is the user's
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def null_if_not_finite(value: Any) -> Any:
    """The same with None in the place of every number that JSON does not know."""
    if isinstance(value, dict):
        return {name: null_if_not_finite(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [null_if_not_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
