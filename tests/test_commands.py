"""`encode`, `reconstruct` and `visualize` where something goes wrong at half: what is done is kept, and told.

The model is a stand-in, since these tests are about what lies around it.
"""

import errno
import itertools
import json
import os
import shlex
import shutil
import signal
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import nn
from typer.testing import CliRunner

from stellar_fast import StellarOutput
from stellar_fast.cli import app
from stellar_fast.commands import console, outputs
from stellar_fast.fidelity import fidelity
from stellar_fast.files import MARK, TEMPORARY, explained

SIZE, PATCH, TOKENS, WIDTH = 16, 8, 3, 5
At = Callable[[int], object]


class Stub(nn.Module):
    """A model: every feature of an image is its mean in [0, 1], in views of a far larger storage; it decodes to that.

    `at` is called with the number of a pass before it is made.
    """

    def __init__(self, at: At = lambda number: None) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(image_size=SIZE, patch_size=PATCH)
        self.at, self.passes = at, itertools.count(1)
        self.storages: list[weakref.ref[np.ndarray]] = []
        self.most_alive = 0

    @property
    def encoder(self) -> "Stub":
        return self

    def grid(self, images: torch.Tensor) -> tuple[int, int]:
        return images.shape[-2] // PATCH, images.shape[-1] // PATCH

    def forward(self, images: torch.Tensor) -> StellarOutput:
        self.at(next(self.passes))
        mean = images.double().mean(dim=(1, 2, 3)).float() / 255
        grid = self.grid(images)
        places = grid[0] * grid[1]
        storage = np.zeros((len(images), 100, WIDTH), dtype=np.float32)
        self.storages.append(weakref.ref(storage))
        self.most_alive = max(self.most_alive, sum(storage() is not None for storage in self.storages))
        whole = torch.from_numpy(storage)
        whole += mean[:, None, None]
        dense = whole[:, 20 : 20 + places]
        return StellarOutput(
            whole[:, :1], whole[:, 1 : 1 + TOKENS], dense, dense[..., :TOKENS], dense, whole[:, 0, :TOKENS], grid
        )

    def reconstruct(self, features: Any, grid: tuple[int, int]) -> dict[str, torch.Tensor]:
        return {"reconstruction": features["sparse"][:, :1, :1, None].expand(-1, 3, SIZE, SIZE)}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Seven pictures of one colour each, a file that is no image among them."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(7):
        Image.new("RGB", (20, 20), (10 + 30 * i,) * 3).save(folder / f"{i}.png")
    (folder / "3.png").write_bytes(b"no image")
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, photos: Path) -> Callable[..., Any]:
    """Run a command on the photos, two in a pass, with the stub that calls `at`."""
    monkeypatch.chdir(tmp_path)

    def run(command: str, *arguments: object, at: At = lambda number: None) -> Any:
        stub = Stub(at)
        for name in ("load", "load_full"):
            monkeypatch.setattr(f"stellar_fast.commands.images.{name}", lambda *_: stub)
        options = ["--images", "photos", "--weights", "w", "--batch-size", "2", *map(str, arguments)]
        if command == "reconstruct":
            options.append("--no-tokens")
        result = CliRunner().invoke(app, [command, *options], env={"COLUMNS": "300"})
        result.stub = stub
        assert isinstance(result.exception, (SystemExit, type(None))), result.exception
        assert not list(tmp_path.rglob(f"{TEMPORARY}*"))
        return result

    return run


def read(path: Path) -> tuple[dict[str, str], list[str], dict[str, torch.Tensor]]:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        return metadata, json.loads(metadata["names"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def at(number: int, action: Callable[[], object]) -> At:
    return lambda found: action() if found == number else None


def send(name: str) -> Callable[[], None]:
    return lambda: signal.raise_signal(signal.Signals[name])


def go_on(result: Any) -> list[str]:
    """The words of the command that is printed."""
    (line,) = (line for line in result.stdout.splitlines() if "go on with: " in line)
    program, *words = shlex.split(line.split("go on with: ")[1])
    assert program == "stellar-fast"
    return words


SIGNALS = pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])


@SIGNALS
def test_encode_writes_what_is_done_and_says_how_to_go_on(
    run: Callable[..., Any], tmp_path: Path, name: str, code: int
) -> None:
    assert run("encode", "--out", "all.st").exit_code == 0
    result = run("encode", "--out", "f.st", at=at(2, send(name)))  # images 2 and 3, of which 3 is none
    assert result.exit_code == code, result.output
    assert "3 images in f.st\n3 of 7 images are done; go on with: " in result.stdout
    words = go_on(result)
    assert words == shlex.split("encode --images photos --weights w --out f-from-3.st --batch-size 2 --skip 3")
    assert run(words[0], *words[1:]).exit_code == 0
    whole, parts = read(tmp_path / "all.st"), [read(tmp_path / "f.st"), read(tmp_path / "f-from-3.st")]
    assert [part[0]["images"] for part in parts] == ["3 of 7", "4 of 4"]
    assert parts[0][1] + parts[1][1] == whole[1] == ["0.png", "1.png", "2.png", "4.png", "5.png", "6.png"]
    for key, tensor in whole[2].items():
        assert torch.equal(torch.cat([part[2][key] for part in parts]), tensor), key
    assert torch.equal(whole[2]["cls"][:, 0, 0], torch.tensor([10, 40, 70, 130, 160, 190]) / 255)


def test_a_part_does_not_take_the_place_of_the_whole(run: Callable[..., Any], tmp_path: Path) -> None:
    for command, file in (("encode", "f.st"), ("reconstruct", "r/metrics.json")):
        out = file.split("/")[0]
        assert run(command, "--out", out).exit_code == 0
        whole = (tmp_path / file).read_bytes()
        result = run(command, "--out", out, at=at(1, send("SIGINT")))
        assert result.exit_code == 130 and "which a part does not replace" in " ".join(result.output.split())
        assert (tmp_path / file).read_bytes() == whole
        (part,) = (tmp_path / file).parent.glob(f"{Path(file).name}.*")
        assert b'"0.png' in part.read_bytes().replace(b"\\", b"")


def test_going_on_keeps_the_options(run: Callable[..., Any], tmp_path: Path) -> None:
    result = run("encode", "--out", "f-from-1.st", "--skip", 1, "--limit", 5, "--size", 8, at=at(1, send("SIGTERM")))
    words = go_on(result)
    assert words[words.index("--out") :] == shlex.split("--out f-from-3.st --size 8 --batch-size 2 --skip 3 --limit 3")
    assert read(tmp_path / "f-from-1.st")[1] == ["1.png", "2.png"]


@SIGNALS
def test_pictures_that_are_done_stay_and_are_measured(
    run: Callable[..., Any], tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    from stellar_fast import visualize

    drawn: list[Path] = []
    save = visualize.save_image

    def save_image(path: Path, *arguments: Any, **options: Any) -> Path:
        drawn.append(path)
        if len(drawn) == 3:  # within a batch
            signal.raise_signal(signal.Signals[name])
        return save(path, *arguments, **options)

    monkeypatch.setattr(visualize, "save_image", save_image)
    (photos / "3.png").unlink()
    result = run("reconstruct", "--out", "r")
    assert result.exit_code == code, result.output
    assert sorted(os.listdir("r")) == ["0.png.png", "1.png.png", "2.png.png", "metrics.json"]
    record = json.loads(Path("r/metrics.json").read_text())
    assert record["about"] == f"a measurement {MARK}" and record["of"] == 6
    assert [image["name"] for image in record["images"]] == ["0.png", "1.png", "2.png"]
    assert go_on(result)[-7:] == ["--out", "r-from-3", "--no-tokens", "--batch-size", "2", "--skip", "3"]
    drawn.clear()
    result = run("visualize", "--out", "v")
    assert result.exit_code == code and "3 pictures in v\n3 of 6 images are done" in result.stdout
    assert sorted(os.listdir("v")) == ["0.png.png", "1.png.png", "2.png.png"]
    words = go_on(result)
    assert words[-6:] == ["--out", "v", "--batch-size", "2", "--skip", "3"]
    drawn.extend([Path()] * 3)
    assert run(words[0], *words[1:]).exit_code == 0
    assert len(os.listdir("v")) == 6


def test_nothing_done_is_nothing_written(run: Callable[..., Any], tmp_path: Path) -> None:
    def stop() -> None:
        signal.raise_signal(signal.SIGTERM)
        raise ValueError("no features")

    result = run("encode", "--out", "f.st", at=at(1, stop))
    assert (result.exit_code, result.stdout) == (2, "") and "error: no features" in result.stderr
    assert os.listdir(tmp_path) == ["photos"]


def test_a_signal_during_the_save_leaves_it_whole(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = os.fsync
    monkeypatch.setattr("os.fsync", lambda handle: (signal.raise_signal(signal.SIGINT), sync(handle)))
    result = run("encode", "--out", "f.st")
    assert result.exit_code == 130 and "go on" not in result.stdout
    assert read(tmp_path / "f.st")[0]["images"] == "7 of 7"


def test_a_second_signal_ends_the_save_at_once(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(handle: int) -> None:
        time.sleep(1.01)  # one that follows sooner counts as the same
        signal.raise_signal(signal.SIGINT)

    assert run("encode", "--out", "f.st", "--limit", 1).exit_code == 0
    monkeypatch.setattr("os.fsync", interrupt)
    assert run("encode", "--out", "f.st", at=at(2, send("SIGINT"))).exit_code == 130
    assert read(tmp_path / "f.st")[0]["images"] == "1 of 1"  # the earlier one


class TestErrors:
    @pytest.mark.parametrize(
        ("error", "message"),
        [
            (MemoryError(), "memory ran out"),
            (
                RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to\nallocate 7 B"),
                "memory ran out: [enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 B",
            ),
            (torch.OutOfMemoryError("CUDA out of memory. x"), "memory ran out: CUDA out of memory. x"),
            (RuntimeError("can't start new thread"), "can't start new thread: a limit on processes is reached"),
            (OSError(5, "Input/output error"), "[Errno 5] Input/output error"),
        ],
    )
    def test_they_are_one_line_and_what_is_done_is_kept(
        self, run: Callable[..., Any], tmp_path: Path, error: Exception, message: str
    ) -> None:
        def fail() -> None:
            raise error

        result = run("encode", "--out", "f.st", at=at(3, fail))
        assert result.exit_code == 2 and result.stderr.splitlines()[-1] == f"error: {message}"
        assert read(tmp_path / "f.st")[1] == ["0.png", "1.png", "2.png"] and go_on(result)[-1] == "4"

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("part", ["cls", "sparse", "spatial", "dense"])
    def test_features_that_are_not_finite_are_refused_by_name(
        self, run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, value: float
    ) -> None:
        forward = Stub.forward

        def spoilt(self: Stub, images: torch.Tensor) -> StellarOutput:
            output = forward(self, images)
            output[part][output.cls[:, 0, 0] * 255 > 60, -1] = value
            return output

        monkeypatch.setattr(Stub, "forward", spoilt)
        message = "error: the features of {} of {} images at hand are not finite: {}"
        result = run("encode", "--out", "f.st")
        assert result.exit_code == 2
        assert result.stderr.splitlines()[-1] == message.format(1, 1, "2.png")
        _, names, features = read(tmp_path / "f.st")
        assert names == ["0.png", "1.png"] and all(tensor.isfinite().all() for tensor in features.values())
        for command in ("encode", "reconstruct", "visualize"):
            result = run(command, "--out", "new", "--batch-size", 8, "--skip", 1, "--overwrite")
            assert result.exit_code == 2
            assert result.stderr.splitlines()[-1] == message.format(4, 5, "2.png, 4.png, 5.png, 6.png")
            assert not Path("new").is_file() and not (Path("new").is_dir() and os.listdir("new"))

    def test_of_many_images_five_are_named(
        self, run: Callable[..., Any], photos: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = torch.full((1, 3, SIZE, SIZE), float("nan"))
        monkeypatch.setattr(Stub, "reconstruct", lambda self, f, grid: {"reconstruction": whole.expand(6, -1, -1, -1)})
        (photos / os.fsdecode(b"0\xe9\n.png")).write_bytes((photos / "0.png").read_bytes())
        (photos / "0.png").unlink()
        result = run("reconstruct", "--out", "r", "--batch-size", 8)
        line = "error: the reconstructions of 6 of 6 images at hand are not finite: "
        assert result.stderr.splitlines()[-1] == line + r"0\xe9\n.png, 1.png, 2.png, 4.png, 5.png, ..."
        assert os.listdir("r") == []

    def test_a_folder_that_vanishes_ends_the_work(self, run: Callable[..., Any], tmp_path: Path, photos: Path) -> None:
        result = run("encode", "--out", "f.st", at=at(1, lambda: photos.rename("elsewhere")))
        assert result.exit_code == 2 and result.stderr == "error: photos is there no more\n"
        assert read(tmp_path / "f.st")[1] == ["0.png", "1.png"]

    def test_a_disk_that_fills_up_keeps_what_fits(
        self, run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each image takes 128 bytes and its name; what the disk has is told anew before it is written again."""
        free, write = [2**30], outputs.Features.write
        monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=free[-1]))

        def limited(features: outputs.Features, path: Path, metadata: dict[str, str]) -> None:
            if len(features.names) * 128 > free[-1] - 2**16:
                full = OSError(errno.ENOSPC, "No space left on device")
                raise explained(full, path) from full
            write(features, path, metadata)

        monkeypatch.setattr(outputs.Features, "write", limited)
        assert run("encode", "--out", "all.st").exit_code == 0
        result = run("encode", "--out", "f.st", at=at(4, lambda: free.append(2**16 + 700)))
        assert result.exit_code == 2 and "f.st: the disk is full, " in result.stderr
        assert "4 images in f.st\n5 of 7 images are done; go on with: " in result.stdout
        free.append(2**30)
        assert run(*go_on(result)).exit_code == 0
        whole, parts = read(tmp_path / "all.st"), [read(tmp_path / "f.st"), read(tmp_path / "f-from-5.st")]
        assert parts[0][0]["images"] == "5 of 7"
        assert parts[0][1] + parts[1][1] == whole[1]
        assert torch.equal(torch.cat([part[2]["cls"] for part in parts]), whole[2]["cls"])
        before = (tmp_path / "all.st").read_bytes()  # fuller features stay, and the part goes beside them
        result = run("encode", "--out", "all.st", at=at(4, lambda: free.append(2**16 + 700)))
        assert result.exit_code == 2 and (tmp_path / "all.st").read_bytes() == before
        assert len(read(tmp_path / f"all.st.{os.getpid()}")[1]) == 4

    def test_a_disk_without_room_is_told_with_the_first_images(
        self, run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=500))
        passes: list[int] = []
        result = run("encode", "--out", "f.st", at=passes.append)
        assert result.exit_code == 2 and passes == [1] and not (tmp_path / "f.st").exists()
        assert "error: the features of 7 images need 0.0 MiB, and " in result.stderr

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                ("--size", 20_000),
                "size 20,000 makes pictures of 400,000,000 pixels, and Pillow makes none over 178,956,970",
            ),
            (
                ("--size", 13_000, "--batch-size", 7),
                "7 images of 13,000 x 13,000 pixels need 13.2 GiB, and this machine has 8.0",
            ),
        ],
    )
    def test_a_size_beyond_the_machine(
        self, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, arguments: tuple, message: str
    ) -> None:
        monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**21}.get)
        for command in ("encode", "reconstruct", "visualize"):
            result = run(command, "--out", "f", *arguments)
            assert result.exit_code == 2 and f"error: {message}" in result.stderr, result.output

    def test_a_name_that_was_taken_meanwhile_is_not_written_to(self, run: Callable[..., Any], tmp_path: Path) -> None:
        other = Path("f.st")
        result = run("encode", "--out", "f.st", at=at(2, lambda: other.write_text("somebody's")))
        assert result.exit_code == 0 and other.read_text() == "somebody's"
        assert f"the features go to f.st.{os.getpid()}" in result.stderr
        assert len(read(tmp_path / f"f.st.{os.getpid()}")[1]) == 6


def test_encode_keeps_no_batch(run: Callable[..., Any]) -> None:
    stub = run("encode", "--out", "f.st", "--batch-size", 1).stub
    assert len(stub.storages) == 6 and stub.most_alive <= 2  # the one that is made, and that of before
    assert all(storage() is None for storage in stub.storages)


@pytest.mark.parametrize("command", ["encode", "reconstruct", "visualize"])
def test_without_a_terminal_a_line_is_told_now_and_then(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr(console, "INTERVAL_S", 0.0)
    lines = [line for line in run(command, "--out", "x").stderr.splitlines() if "warning: " not in line]
    counts = [line.split(" images, ")[0] for line in lines]
    assert all(line.endswith(" left") and " images/s, " in line for line in lines)
    assert list(dict.fromkeys(counts)) == [
        f"{i} of 7" for i in ((2, 3, 4, 6, 7) if command == "encode" else range(1, 8))
    ]


def test_names_are_bytes(run: Callable[..., Any], photos: Path, tmp_path: Path) -> None:
    names = [b"\x1b[31mred.png", b"[b]:cat:.png", b"caf\xe9.png", b"two\nlines.png", b"x.png/y\xff.png"]
    shutil.rmtree(photos)
    for i, name in enumerate(names):
        path = photos / os.fsdecode(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (50 * i,) * 3).save(path)
    assert run("encode", "--out", "f.st").exit_code == 0
    metadata, held, features = read(tmp_path / "f.st")
    assert [os.fsencode(name) for name in held] == names and metadata["names"].isascii()
    assert torch.equal(features["cls"][:, 0, 0] * 255, 50.0 * torch.arange(5))
    result = run("reconstruct", "--out", "r")
    assert result.exit_code == 0
    for shown in (r"\x1b[31mred.png", "[b]:cat:.png", r"caf\xe9.png", r"two\nlines.png", r"x.png/y\xff.png"):
        assert f"│ {shown} " in result.stdout
    record = json.loads((tmp_path / "r" / "metrics.json").read_bytes())
    assert [os.fsencode(image["name"]) for image in record["images"]] == names
    assert run("visualize", "--out", "v").exit_code == 0
    for folder in (b"r", b"v"):
        for name in names:
            with Image.open(os.fsdecode(folder + b"/" + name.replace(b"x.png/", b"x.png_/") + b".png")) as picture:
                picture.load()


def test_every_image_has_its_picture(run: Callable[..., Any], photos: Path) -> None:
    shutil.rmtree(photos)
    levels = {"a.jpg": 0, "a.png": 60, "a.jpg.png": 120, "x.jpg": 180, "x.jpg.png/y.png": 240}
    for name, level in levels.items():
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (level,) * 3).save(photos / name, format="PNG")
    for command in ("reconstruct", "visualize"):
        result = run(command, "--out", command)
        assert result.exit_code == 0 and f"5 pictures in {command}" in result.stdout
        found = sorted(str(path.relative_to(command)) for path in Path(command).rglob("*.png") if path.is_file())
        assert found == ["a.jpg.png", "a.jpg.png.png", "a.png.png", "x.jpg.png", "x.jpg.png_/y.png.png"]
    for picture, level in zip(found, (0, 120, 60, 180, 240), strict=True):
        with Image.open(Path("reconstruct", picture)) as image:
            original, rebuilt, error = np.split(np.asarray(image), 3, axis=1)
        assert (original == level).all() and (rebuilt == level).all() and not error.any()
    record = json.loads(Path("reconstruct/metrics.json").read_text())
    same = fidelity(original, original)
    assert {image["name"] for image in record["images"]} == set(levels) and record["mean"]["ssim"] == same.ssim


class TestOutputs:
    """Refused before weights and images are read: the stub's first pass would fail."""

    def refused(self, run: Callable[..., Any], command: str, *arguments: object) -> str:
        def fail() -> None:
            raise AssertionError("an image was encoded")

        result = run(command, *arguments, at=at(1, fail))
        assert result.exit_code == 2 and result.stdout == ""
        (line,) = result.stderr.splitlines()
        return line

    def test_what_others_wrote_stays(self, run: Callable[..., Any], tmp_path: Path) -> None:
        for command, out, name in (
            ("encode", "f.st", "f.st"),
            ("reconstruct", "r", "r/metrics.json"),
            ("reconstruct", "q", "q/6.png.png"),
            ("visualize", "v", "v/6.png.png"),
        ):
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.write_text("{}")
            assert "exists and was not written by stellar_fast as" in self.refused(run, command, "--out", out)
            assert path.read_text() == "{}" and (path.parent == tmp_path or os.listdir(out) == [path.name])
            for overwrite in ("--overwrite", "--limit=0"):  # ours, from then on
                assert run(command, "--out", out, overwrite).exit_code == 0, out
            assert MARK.encode() in path.read_bytes()[:4096]

    def test_an_input_stays_even_if_told(self, run: Callable[..., Any], photos: Path, tmp_path: Path) -> None:
        before = (photos / "0.png").read_bytes()
        (tmp_path / "link.st").symlink_to("photos/0.png")
        (tmp_path / "w").write_text("weights")
        for out, same in (("photos/0.png", "photos/0.png"), ("link.st", "photos/0.png"), ("w", "w")):
            line = self.refused(run, "encode", "--out", out, "--overwrite")
            assert f" is {same}, which is read: name another file to write" in line
        assert (photos / "0.png").read_bytes() == before and (tmp_path / "w").read_text() == "weights"

    def test_a_link_is_followed(self, run: Callable[..., Any], tmp_path: Path) -> None:
        (tmp_path / "link.st").symlink_to("deep/f.st")
        assert run("encode", "--out", "link.st").exit_code == 0
        assert (tmp_path / "link.st").is_symlink() and len(read(tmp_path / "deep" / "f.st")[1]) == 6
        (tmp_path / "v").symlink_to("deep/v")
        assert run("visualize", "--out", "v").exit_code == 0 and len(os.listdir(tmp_path / "deep" / "v")) == 6

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ("encode --out ''", "the name of the file to write is empty"),
            ("visualize --out ''", "out is empty: name a folder"),
            ("encode --out f.st --images ''", "images is empty: name a folder of images, or one image"),
            ("encode --out /dev/null", "/dev/null is a device, not a file: nothing is written there"),
            ("reconstruct --out /dev/null", "/dev/null cannot be a folder: /dev/null is a device"),
            ("encode --out pipe", "pipe is a FIFO, not a file: nothing is written there"),
            ("encode --out photos", "photos is a folder: name a file in it"),
            ("encode --out new/", "new/ is a folder: name a file in it"),
            ("encode --out circle", "circle is a link that leads to itself"),
            (f"encode --out new/{'x' * 256}", "has a name of more than 255 bytes"),
            ("encode --out photos/0.png/f.st", "photos/0.png is a file"),
            ("visualize --out pipe/new", "pipe is a FIFO"),
            ("visualize --out photos/new", "would mix with them"),
            ("encode --out f.st --skip 7", "skip 7 leaves none of the 7 images under photos"),
            ("encode --out f.st --skip -1", "limit 0 and skip -1 must be at least 0"),
        ],
    )
    def test_impossible_ones_are_told_before_the_work(
        self, run: Callable[..., Any], tmp_path: Path, arguments: str, message: str
    ) -> None:
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "circle").symlink_to("circle")
        assert message in self.refused(run, *shlex.split(arguments))
        assert sorted(os.listdir(tmp_path)) == ["circle", "photos", "pipe"]

    def test_two_at_once_in_one_folder(self, run: Callable[..., Any]) -> None:
        inner = []
        result = run("visualize", "--out", "v", at=at(1, lambda: inner.append(run("visualize", "--out", "v"))))
        assert result.exit_code == 0 and len(os.listdir("v")) == 6
        assert inner[0].exit_code == 2 and "v is in use by another process" in inner[0].stderr
