"""Files appear whole: written to a temporary name beside the target, then renamed. And none takes another's place.

What this package writes for a user carries MARK near its beginning. Only such a file is replaced without being told to.
"""

import contextlib
import errno
import functools
import hashlib
import math
import os
import re
import shlex
import shutil
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

MARK = "written by stellar_fast"
PICTURE = "a picture"  # a kind of file, see check_output
TEMPORARY = ".writing-"  # what a killed process may leave behind starts with it
LONGEST_NAME = 255  # bytes, without the folder's
LONGEST = 160  # characters of a plain name; a file name has room for 255 bytes, what is added to it included
_MARKED_BYTES = 4096  # from the beginning, where MARK has to stand


def shown(name: str | os.PathLike[str]) -> str:
    r"""A file's name as one line that any terminal prints: line breaks, controls and bytes that are no UTF-8 as \xff.

    File names are bytes to the system. Python holds those that are no UTF-8 as lone surrogates, which `os.fsencode`
    turns back and which neither prints nor encodes. JSON holds them by its own escapes, with `json.dumps`' defaults.
    """
    return printable(os.fsencode(name).decode("utf-8", "surrogateescape"))


def printable(text: str) -> str:
    """Any text as one line that is safe to print, names that stand in it as `shown` has them."""
    return "".join(c if c.isprintable() else _visible(c) for c in text)


def _visible(c: str) -> str:
    return f"\\x{ord(c) - 0xDC00:02x}" if "\udc80" <= c <= "\udcff" else c.encode("unicode_escape").decode()


def plain_name(text: str) -> str:
    """A name that any file system takes, of small letters, digits and hyphens, at most LONGEST of them.

    Where more is lost than the case and the punctuation of an ASCII text, it ends in a hash of the text.
    """
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if name and text.isascii() and len(name) <= LONGEST:
        return name
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return f"{name[: LONGEST - 13]}-{digest}".lstrip("-")


def command_line(words: Iterable[str]) -> str:
    r"""Words as one line to paste into a shell; a name that does not print on one line becomes $'caf\xe9'."""
    return " ".join(shlex.quote(word) if shown(word) == word else _escaped(word) for word in words)


def _escaped(word: str) -> str:
    word = word.replace("\\", "\\\\").replace("'", "\\'")
    escaped = (c if c.isprintable() else "".join(f"\\x{b:02x}" for b in os.fsencode(c)) for c in word)
    return f"$'{''.join(escaped)}'"


@contextlib.contextmanager
def utf8_path(path: Path) -> Iterator[str]:
    """A name that is UTF-8 for what exists, for libraries that take no other; it holds inside of the block."""
    if os.fsencode(path).decode("utf-8", "ignore") == str(path):
        yield str(path)
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        yield f"/proc/self/fd/{handle}"
    finally:
        os.close(handle)


_held: set[int] = set()  # descriptors of locks


def _let_go(*handles: int) -> None:
    for handle in _held.intersection(handles):
        _held.remove(handle)
        os.close(handle)


# A forked process shares its parent's locks: a data worker that outlives a killed run would keep the next one out.
os.register_at_fork(after_in_child=lambda: _let_go(*_held))


def lock_folder(folder: Path) -> contextlib.ExitStack:
    """Hold a folder for this process until what is returned is closed.

    Nothing is written, except where a file system (NFS) locks no folders: there a file .lock stays.

    Raises:
        ValueError: another process holds it.
    """

    def hold(path: Path, flags: int) -> int:
        handle = os.open(path, flags, 0o666)
        _held.add(handle)
        held.callback(_let_go, handle)
        return handle

    with contextlib.ExitStack() as held:
        try:
            handle = hold(folder, os.O_RDONLY | os.O_DIRECTORY)
            if not _lock(handle) and not _lock(hold(folder / ".lock", os.O_RDWR | os.O_CREAT)):
                text = f"the file system of {shown(folder)} has no locks: let no second process write there"
                warnings.warn(text, stacklevel=2)
            if folder.exists() and os.path.samestat(os.fstat(handle), folder.stat()):
                return held.pop_all()  # else its holder, who had made it, has removed it
        except BlockingIOError:
            pass
    raise ValueError(f"{shown(folder)} is in use by another process")


def _lock(handle: int) -> bool:
    """Whether the file system has such locks; BlockingIOError where another process holds this one."""
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def check_output(
    path: str | os.PathLike[str],
    *,
    kind: str = "",
    overwrite: bool = False,
    inputs: Iterable[str | os.PathLike[str]] = (),
) -> Path:
    """Where a file of this name would be written, found out before the work for it begins.

    Args:
        path: of the file; folders that are missing may stay so.
        kind: what is written, such as "a picture". A file of ours may be replaced by one of its kind alone; "" by any.
        overwrite: whether a file that this package did not write may be replaced.
        inputs: files that are read and must not be replaced, whatever `overwrite` says.

    Returns:
        `path`, or the file that a link of this name leads to.

    Raises:
        ValueError: an empty name, a folder, a device or the like, one of the inputs, a file that somebody else wrote,
            or a place where nothing can be written.
    """
    return check_outputs([path], kind=kind, overwrite=overwrite, inputs=inputs)[0]


def check_outputs(
    paths: Iterable[str | os.PathLike[str]],
    *,
    kind: str = "",
    overwrite: bool = False,
    inputs: Iterable[str | os.PathLike[str]] = (),
) -> list[Path]:
    """`check_output` of many files at once, each of which has to be another. `inputs` are looked at if any is there."""
    targets: dict[Path, None] = {}
    real = functools.cache(os.path.realpath)

    @functools.cache
    def read() -> dict[tuple[int, int], str | os.PathLike[str]]:
        return {_identity(name): name for name in inputs if os.path.exists(name)}

    for path in paths:
        folder, name = os.path.split(path)
        if not name and not folder:
            raise ValueError("the name of the file to write is empty")
        exists = os.path.lexists(path)
        target = Path(os.path.realpath(path) if exists else os.path.join(real(folder), name))
        reason = ""
        if name in ("", ".", ".."):
            reason = "is a folder: name a file in it"
        elif target in targets:
            reason = "is a file that is written already: each needs one of its own"
        elif len(os.fsencode(name)) > LONGEST_NAME:
            reason = f"has a name of more than {LONGEST_NAME} bytes, which no file can have"
        elif exists:
            reason = _why_kept(target, kind, overwrite, read)
        if reason:
            is_link = target != Path(os.path.abspath(path))
            raise ValueError(f"{shown(path)}{f' (a link to {shown(target)})' if is_link else ''} {reason}")
        targets[target] = None
    for parent in dict.fromkeys(target.parent for target in targets):
        check_writable(parent)
    return list(targets)


def _why_kept(
    target: Path,
    kind: str,
    overwrite: bool,
    read: Callable[[], Mapping[tuple[int, int], str | os.PathLike[str]]],
) -> str:
    """Why what is there may not be replaced; "" where it may. `read` gives the inputs."""
    if target.is_symlink():
        return "is a link that leads to itself"
    if not target.exists():  # what a link leads to
        return ""
    if target.is_dir():
        return "is a folder: name a file in it"
    if not target.is_file():
        return f"is {_kind(target)}, not a file: nothing is written there"
    if (same := read().get(_identity(target))) is not None:
        return f"is {shown(same)}, which is read: name another file to write"
    if not overwrite and not is_ours(target, kind):
        what = f" as {kind}" if kind else ""
        return f"exists and was not written by stellar_fast{what}: name another, or say --overwrite"
    return ""


def _identity(path: str | os.PathLike[str]) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Raise ValueError where no file can be made in a folder, which may still be missing; nothing is left there."""
    place = Path(os.path.realpath(folder))
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise ValueError(f"{shown(folder)} cannot be a folder: {shown(place)} is {_kind(place)}")
    try:
        handle, temporary = tempfile.mkstemp(dir=place, prefix=TEMPORARY)
    except OSError as error:
        raise ValueError(f"nothing can be written in {shown(place)}: {error.strerror}") from error
    os.close(handle)
    os.unlink(temporary)


def mark(kind: str = "") -> str:
    """What a file of a kind carries."""
    return f"{kind} {MARK}" if kind else MARK


def is_ours(path: Path, kind: str = "") -> bool:
    """Whether a file carries MARK, or that of a kind."""
    with path.open("rb") as file:
        return mark(kind).encode() in file.read(_MARKED_BYTES)


def write_atomically(
    path: str | os.PathLike[str], data: bytes | Callable[[IO[bytes]], object], size: int | None = None
) -> None:
    """Write `data`, or what a function writes to a file, so that a reader or a crash never sees half of it.

    `size` is in bytes what the function writes, where that is known.

    Raises:
        OSError: with the path, and where the disk is full with what was needed and what there is.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = None
    try:
        # with the beginning of the name: what a killed process leaves behind tells whose it is
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f"{TEMPORARY}{path.name[:40]}-")
        with os.fdopen(handle, "wb") as file:
            data(file) if callable(data) else file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes private files; this one is the user's
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        if isinstance(error, OSError):
            raise explained(error, path, size if callable(data) else len(data)) from error
        raise


def is_of_full_disk(error: OSError) -> bool:
    """Whether it says that a disk, or one's part of it, has no room left; one that is `explained` too."""
    while error.errno is None and isinstance(error.__cause__, OSError):
        error = error.__cause__
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def explained(error: OSError, path: str | os.PathLike[str], needed_bytes: int | None = None) -> OSError:
    """The same kind of error as one sentence with the path and, of a full disk, what is needed and what there is.

    Its `errno` is that of its cause alone: an OSError with a number does not print its sentence.
    """
    while error.errno is None and isinstance(error.__cause__, OSError):  # explained already, of a part of it
        error = error.__cause__
    reason = error.strerror or str(error)
    if is_of_full_disk(error):
        with contextlib.suppress(OSError):
            free_mib = shutil.disk_usage(Path(path).parent).free / 2**20
            needed = "" if needed_bytes is None else f"{needed_bytes / 2**20:,.1f} MiB are needed, "
            reason = f"the disk is full, {needed}{free_mib:,.1f} MiB are free"
    return type(error)(f"cannot write {shown(path)}: {reason}")


def _kind(path: Path) -> str:
    return kind_of(path.stat().st_mode)


def kind_of(mode: int) -> str:
    """What a mode, such as `os.stat` gives, is that of."""
    kinds = {
        "a folder": stat.S_ISDIR,
        "a file": stat.S_ISREG,
        "a FIFO": stat.S_ISFIFO,
        "a socket": stat.S_ISSOCK,
        "a device": lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode),
    }
    return next((kind for kind, test in kinds.items() if test(mode)), "something else")


def null_if_not_finite(value: Any) -> Any:
    """The same with None in the place of every number that JSON does not know."""
    if isinstance(value, dict):
        return {name: null_if_not_finite(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [null_if_not_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
