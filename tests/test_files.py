"""Files appear whole, take nobody's place, and their names print."""

import errno
import fcntl
import json
import os
import re
import stat
import subprocess
import tempfile
from pathlib import Path

import pytest

from stellar_fast.files import (
    MARK,
    check_output,
    check_writable,
    command_line,
    lock_folder,
    plain_name,
    shown,
    utf8_path,
    write_atomically,
)


def test_the_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "file.bin"
    write_atomically(path, b"one")
    write_atomically(path, lambda file: file.write(b"two"))
    assert path.read_bytes() == b"two"
    assert stat.S_IMODE(path.stat().st_mode) & stat.S_IRUSR

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match=r"cannot write .*file\.bin: the disk is full, 0\.0 MiB are needed, .* are free"):
        write_atomically(path, b"three")
    assert path.read_bytes() == b"two"
    assert list(path.parent.iterdir()) == [path]


def test_a_name_as_long_as_the_system_takes_is_written(tmp_path):
    path = tmp_path / ("x" * 255)
    write_atomically(path, b"one")
    assert path.read_bytes() == b"one"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (b"a photo, \xc3\xa9\xe4\xb8\xad.jpg", "a photo, é中.jpg"),
        (b"caf\xe9.jpg", r"caf\xe9.jpg"),
        (b"two\nlines\t\x1b[31m.jpg", r"two\nlines\t\x1b[31m.jpg"),
    ],
)
def test_a_name_is_kept_exactly_and_shown_on_one_line(name: bytes, text: str) -> None:
    held = os.fsdecode(name)
    assert shown(held) == shown(Path(held)) == text
    assert os.fsencode(json.loads(json.dumps(held))) == name
    text.encode("utf-8")


class TestCheckOutput:
    def test_what_is_new_or_ours_may_be_written(self, tmp_path):
        path = tmp_path / "deep" / "file.json"
        assert check_output(path) == path and not path.parent.exists()
        write_atomically(path, json.dumps({"about": MARK}).encode())
        assert check_output(path) == path
        link = tmp_path / "link"
        link.symlink_to(path)
        assert check_output(link) == path

    def test_what_others_wrote_is_refused_unless_told(self, tmp_path):
        path = tmp_path / "metrics.json"
        path.write_text("{}")
        with pytest.raises(
            ValueError, match=r"metrics\.json exists and was not written by stellar_fast: .*--overwrite"
        ):
            check_output(path)
        assert check_output(path, overwrite=True) == path
        link = tmp_path / "link"
        link.symlink_to(path)
        with pytest.raises(ValueError, match=r"link \(a link to .*metrics\.json\) exists"):
            check_output(link)
        assert path.read_text() == "{}" and link.is_symlink()

    def test_inputs_are_never_replaced(self, tmp_path):
        photo, other = tmp_path / "photo.png", tmp_path / "hard.png"
        photo.write_text(MARK)
        os.link(photo, other)
        with pytest.raises(ValueError, match=r"hard\.png is .*photo\.png, which is read"):
            check_output(other, overwrite=True, inputs=[photo])

    def test_places_where_no_file_can_be_are_named(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "file").write_text(MARK)
        for path, message in {
            "": "the name of the file to write is empty",
            "/dev/null": "/dev/null is a device, not a file",
            tmp_path: "is a folder: name a file in it",
            tmp_path / "pipe": "pipe is a FIFO, not a file",
            tmp_path / "file" / "deep" / "x.json": r"file/deep cannot be a folder: .*file is a file",
        }.items():
            with pytest.raises(ValueError, match=message):
                check_output(path, overwrite=True)

    def test_a_folder_that_takes_no_file_is_named(self, tmp_path, monkeypatch):
        def refuse(**_):
            raise OSError(errno.EROFS, "Read-only file system")

        monkeypatch.setattr(tempfile, "mkstemp", refuse)
        with pytest.raises(ValueError, match=r"nothing can be written in .*: Read-only file system"):
            check_writable(tmp_path / "missing")
        assert not list(tmp_path.iterdir())


def test_a_lock_writes_nothing_and_holds_against_all_but_the_forked(tmp_path):
    (tmp_path / ".lock").write_text("somebody's")
    before = tmp_path.stat().st_mtime_ns
    with lock_folder(tmp_path), pytest.raises(ValueError, match="is in use by another process"):
        lock_folder(tmp_path)
    ready, go_on = os.pipe(), os.pipe()
    held = lock_folder(tmp_path)
    if os.fork() == 0:  # such as a data worker, which may outlive its parent
        os.write(ready[1], b"1")
        os.read(go_on[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    held.close()
    lock_folder(tmp_path).close()
    os.write(go_on[1], b"1")
    os.wait()
    assert (tmp_path / ".lock").read_text() == "somebody's" and tmp_path.stat().st_mtime_ns == before


def test_where_folders_have_no_locks_a_file_is_locked(tmp_path, monkeypatch):
    real = fcntl.flock

    def flock(handle, operation):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EBADF, "Bad file descriptor")  # NFS
        real(handle, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    (tmp_path / ".lock").write_text("somebody's")
    with lock_folder(tmp_path), pytest.raises(ValueError, match="is in use by another process"):
        lock_folder(tmp_path)
    assert (tmp_path / ".lock").read_text() == "somebody's"

    def none(handle, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.warns(UserWarning, match="has no locks: let no second process write there"):
        lock_folder(tmp_path).close()


@pytest.mark.parametrize(
    "name", [b"plain", b"a b", b"it's", b"caf\xe9a'\\x41\n$HOME\t.jpg", "é".encode(), b"\x1b[31m", b""]
)
def test_a_command_line_pastes(name: bytes) -> None:
    line = command_line(["printf", "%s", os.fsdecode(name)])
    assert line.isprintable()
    assert subprocess.run(["bash", "-c", line], capture_output=True, check=True).stdout == name


def test_a_library_opens_any_name(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9")
    path.write_bytes(b"one")
    with utf8_path(path) as name:
        assert Path(name.encode().decode()).read_bytes() == b"one"
    with utf8_path(tmp_path / "é") as name:
        assert name == str(tmp_path / "é")


def test_every_device_has_a_file_name_of_its_own():
    names = ["Größe A", "Gräße A", "Größe a" * 20, "山田", "山本", "x" * 300, "x" * 301, "", "..", "a\udcff"]
    plain_names = [plain_name(name) for name in names]
    assert len(set(plain_names)) == len(names) and all(
        re.fullmatch("[a-z0-9][a-z0-9-]{7,159}", found) for found in plain_names
    )
    assert plain_name("Intel(R) Xeon(R) Processor family 6 model 167") == "intel-r-xeon-r-processor-family-6-model-167"
