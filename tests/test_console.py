"""What the commands say: progress without a terminal, names that no terminal obeys, streams that lose what they may."""

import errno
import io
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from stellar_fast.commands import console
from stellar_fast.commands.console import Progress, duration, ended_by, say, tell


class TestProgress:
    def lines(self, capsys: pytest.CaptureFixture[str], *steps: tuple[float, int], about: str = "") -> list[str]:
        """What is told of (seconds, images done) of 5,000."""
        times = iter([0.0, *(time for time, _ in steps)])
        with Progress(5000, "images", clock=lambda: next(times)) as progress:
            for _, done in steps:
                progress.update(done, about)
            assert progress.done == steps[-1][1]
        captured = capsys.readouterr()
        assert captured.out == ""
        return captured.err.splitlines()

    def test_a_line_every_thirty_seconds(self, capsys: pytest.CaptureFixture[str]) -> None:
        steps = [(10.0, 42), (29.9, 120), (30.5, 128), (59.0, 240), (61.0, 250), (70.0, 5000)]
        assert self.lines(capsys, *steps) == [
            "128 of 5,000 images, 4.2 images/s, 19 min left",
            "250 of 5,000 images, 4.1 images/s, 19 min left",
        ]

    def test_slow_and_fast_work(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.lines(capsys, (100.0, 0)) == ["0 of 5,000 images"]
        assert self.lines(capsys, (100.0, 3)) == ["3 of 5,000 images, 0.03 images/s, 46 h 16 min left"]
        assert self.lines(capsys, (40.0, 4800)) == ["4,800 of 5,000 images, 120.0 images/s, 2 s left"]
        assert self.lines(capsys, (1.0, 4800)) == []

    def test_what_is_going_on(self, capsys: pytest.CaptureFixture[str]) -> None:
        (line,) = self.lines(capsys, (50.0, 100), about="koleo [N=2]")
        assert line == "100 of 5,000 images, 2.0 images/s, 41 min left: koleo [N=2]"

    @pytest.mark.parametrize(
        ("seconds", "text"), [(0, "0 s"), (59.4, "59 s"), (89, "1 min"), (3599, "1 h 0 min"), (7500, "2 h 5 min")]
    )
    def test_durations(self, seconds: float, text: str) -> None:
        assert duration(seconds) == text


def test_a_message_is_one_line_that_no_terminal_obeys(capsys: pytest.CaptureFixture[str]) -> None:
    name = os.fsdecode(b"caf\xe9 [bold]:cat:[/] \x1b[31m\x07 \xe2\x80\xae\xc3\xa9.jpg")
    say("[red]error:[/]", f"cannot\n  read {name}")
    tell(f"read {name}\n")
    shown = r"caf\xe9 [bold]:cat:[/] \x1b[31m\x07 \u202eé.jpg"
    captured = capsys.readouterr()
    assert captured.err == f"error: cannot read {shown}\n"
    assert captured.out == f"read {shown}\\n\n"


class TestLosing:
    @pytest.fixture
    def pipe(self) -> Iterator[tuple[int, int]]:
        ends = os.pipe()
        yield ends
        for end in ends:
            os.close(end)

    def stream(self, handle: int) -> io.TextIOWrapper:
        buffer = io.BufferedWriter(console._Losing(handle, "w", closefd=False))
        return io.TextIOWrapper(buffer, "ascii", errors="backslashreplace", line_buffering=True)

    def test_what_cannot_be_written_is_lost(self) -> None:
        for name, mode, number in (("/dev/full", "w", errno.ENOSPC), (os.devnull, "r", errno.EBADF)):
            with open(name, mode) as file, self.stream(file.fileno()) as stream:
                stream.write("gone\n" * 10_000)
                stream.write("gone too\n")
                assert stream.buffer.raw.error.errno == number

    def test_what_cannot_be_encoded_is_escaped(self, pipe: tuple[int, int]) -> None:
        with self.stream(pipe[1]) as stream:
            stream.write("é\udce9\n")
        assert os.read(pipe[0], 100) == b"\\xe9\\udce9\n"

    def test_a_full_pipe_that_does_not_block_is_waited_for(self, pipe: tuple[int, int]) -> None:
        os.set_blocking(pipe[1], False)
        text, found = "0123456789\n" * 30_000, bytearray()

        def read() -> None:
            while len(found) < len(text):
                found.extend(os.read(pipe[0], 1000))

        reader = threading.Thread(target=read)
        with self.stream(pipe[1]) as stream:
            reader.start()
            stream.write(text)
        reader.join()
        assert found.decode() == text and stream.buffer.raw.error is None


def test_a_signal_ends_the_block_and_exits_as_a_shell_tells_it() -> None:
    cleaned = []
    for number, code in ((signal.SIGTERM, 143), (signal.SIGHUP, 129)):
        before = signal.getsignal(number)
        signal.signal(number, signal.SIG_DFL)
        try:
            with pytest.raises(SystemExit) as exit, ended_by(number):
                try:
                    signal.raise_signal(number)
                finally:
                    cleaned.append(number)
            assert exit.value.code == code and signal.getsignal(number) is signal.SIG_DFL
            signal.signal(number, signal.SIG_IGN)  # nohup
            with ended_by(number):
                signal.raise_signal(number)
        finally:
            signal.signal(number, before)
    assert cleaned == [signal.SIGTERM, signal.SIGHUP]


def test_what_standard_output_does_not_take_is_an_error_where_it_was_the_result(tmp_path: Path) -> None:
    """Of whole processes, since it is theirs; not where the reader went away."""
    gone, end = os.pipe()
    os.close(gone)
    full, closed = (f"error: standard output takes no more: {os.strerror(n)}\n" for n in (errno.ENOSPC, errno.EBADF))
    expected = {
        "info >/dev/full": (1, full),
        "info >&-": (1, closed),
        f"info >&{end}": (0, ""),
        f"--help >&{end}": (0, ""),
    }
    started = [
        subprocess.Popen(
            ["bash", "-c", f"exec {sys.executable} -m stellar_fast.cli {line}"],
            cwd=tmp_path,
            pass_fds=(end,),
            stderr=subprocess.PIPE,
            text=True,
        )
        for line in expected
    ]
    told = [process.communicate()[1] for process in started]
    os.close(end)
    assert [(process.returncode, text) for process, text in zip(started, told, strict=True)] == [*expected.values()]
