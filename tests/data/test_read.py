"""Which files are opened, how many pixels they may have, and how much is decoded at once."""

import io
import os
import pickle
import random
import socket
import sys
import threading
import types
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stellar_fast.commands.inputs import batches, find
from stellar_fast.data import ImageReader, TooManyPixels, load_image, read
from tests.data.containers import tiff


def save(path: Path, size: tuple[int, int] = (8, 6), color: tuple[int, int, int] = (10, 20, 30), **options) -> Path:
    Image.new("RGB", size, color).save(path, **options)
    return path


def test_only_regular_files_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's name has to be short
    fifo, sock, folder, link = (tmp_path / f"{name}.jpg" for name in ("fifo", "sock", "folder", "link"))
    os.mkfifo(fifo)
    folder.mkdir()
    link.symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(sock.name)
        for path, kind in ((fifo, "a FIFO"), (sock, "a socket"), (folder, "a folder"), (link, "a device")):
            with pytest.raises(ValueError, match=f"cannot read image {path}: it is {kind}, not a file"):
                load_image(path)
    good = save(tmp_path / "good.png")
    link.unlink()
    link.symlink_to(good)
    assert load_image(link).getpixel((0, 0)) == (10, 20, 30)


def test_a_fifo_that_takes_a_files_place_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "x.png")
    file = os.stat(path)
    path.unlink()
    os.mkfifo(path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", lambda *args, **kwargs: file)
        with pytest.raises(ValueError, match=r"x\.png: it is a FIFO, not a file"):
            load_image(path)


@pytest.mark.parametrize(
    ("name", "shown"),
    [(b"caf\xe9.png", r"caf\xe9.png"), (b"line\nbreak.png", r"line\nbreak.png"), (b"\xe2\x80\xae.png", r"\u202e.png")],
)
def test_reasons_are_one_line_with_the_shown_name(tmp_path: Path, name: bytes, shown: str) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    for content, reason in (
        (None, "No such file or directory"),
        (b"", "the file is empty"),
        (b"nothing that anyone knows", "it is no image"),
        (b"\xff\xd8\xff\xe0", "it is no image that can be read (as JPEG: "),
        (bytes(4) + b"ftypheic", "it is no image that can be read (of HEIF's kind: pip install pillow-heif)"),
        (b"P5 0 7 255\n", "it is no image that can be read (as PPM: it has no pixels"),
        (b"P5 9 7 255\n", "image file is truncated (0 bytes not processed)"),
    ):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ValueError) as error:
            load_image(path)
        assert str(error.value).startswith(f"cannot read image {tmp_path}/{shown}: {reason}")
        assert str(error.value).isprintable()


def test_programs_are_not_run(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n")
    with pytest.raises(ValueError, match=r"x\.jpg: it is no image"):
        load_image(path)


def test_endings_follow_pillow_but_for_what_is_no_picture() -> None:
    known = read.endings()
    assert {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"} <= known.keys()
    assert {".avif", ".jp2", ".tga", ".psd", ".mpo", ".pfm"} <= known.keys()
    assert not {".pdf", ".eps", ".ps", ".wmf", ".emf", ".fits", ".h5", ".mpg", ".grib", ".palm", ".txt"} & known.keys()


def test_heif_is_read_where_its_package_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = types.ModuleType("pillow_heif")

    def register() -> None:  # a format of its own that holds a PNG
        def opened(file, name):
            file.seek(12)
            return Image.open(io.BytesIO(file.read()))

        monkeypatch.setitem(Image.OPEN, "HEIF", (opened, lambda prefix: prefix[4:12] == b"ftypheic"))
        monkeypatch.setattr(Image, "ID", [*Image.ID, "HEIF"])
        monkeypatch.setitem(Image.EXTENSION, ".heic", "HEIF")

    package.register_heif_opener = register  # type: ignore[attr-defined]
    Image.init()
    monkeypatch.setitem(sys.modules, "pillow_heif", package)
    for cached in (read._register_heif, read._formats):
        cached.cache_clear()
    try:
        path = save(tmp_path / "x.png")
        (tmp_path / "x.heic").write_bytes(bytes(4) + b"ftypheic" + path.read_bytes())
        assert load_image(tmp_path / "x.heic").getpixel((0, 0)) == (10, 20, 30)
        assert read.endings()[".heic"] == "HEIF"
    finally:
        for cached in (read._register_heif, read._formats):
            cached.cache_clear()


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif", ".gif", ".bmp"])
def test_the_limit_on_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    between, above = save(tmp_path / f"between{suffix}", (9, 9)), save(tmp_path / f"above{suffix}", (20, 30))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(between).size == (9, 9)
        assert load_image(above, max_pixels=600).size == (20, 30)
        with pytest.raises(
            TooManyPixels, match=r"above\S+: (its 20 x 30 pixels are|it has) more than 100 pixels; --max-p"
        ):
            load_image(above)
        with pytest.raises(
            TooManyPixels, match=r"its 20 x 30 pixels are more than 599 pixels; --max-pixels N \(max_pix"
        ):
            load_image(above, max_pixels=599)
        with pytest.raises(TooManyPixels, match="its 9 x 9 pixels are more than 80 pixels"):
            load_image(between, max_pixels=80)
        assert Image.MAX_IMAGE_PIXELS == 50
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
        assert load_image(above).size == (20, 30)
    with pytest.raises(ValueError, match="max_pixels must be at least 1 but is 0"):
        load_image(above, max_pixels=0)


def test_the_limit_is_pillows_own_again_after_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    paths = [save(tmp_path / f"{i}.tif", (9, 9 + i)) for i in range(6)]
    reader = ImageReader(max_pixels=1000)
    with ThreadPoolExecutor(6) as pool:
        sizes = list(pool.map(lambda path: reader.load(path).size, paths * 20))
    assert sizes == [(9, 9 + i) for i in range(6)] * 20 and Image.MAX_IMAGE_PIXELS == 50


def test_short_memory_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "x.png")
    sentence = r"cannot read image .*x\.png: too little memory for its 8 x 6 pixels"
    with pytest.raises(ValueError, match=sentence), ImageReader().opened(path):
        raise MemoryError
    monkeypatch.setattr(read, "_over_white", lambda image: np.empty(1 << 62, np.uint8))
    with pytest.raises(ValueError, match=sentence):
        load_image(path)


def test_an_error_of_the_work_is_its_own(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="mine"), ImageReader().opened(save(tmp_path / "x.png")):
        raise RuntimeError("mine")


def test_no_more_pixels_than_the_budget_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    budget = read._Budget(100)
    monkeypatch.setattr(read, "_budget", budget)
    draw = random.Random(0)
    sizes = [(draw.randrange(1, 12), draw.randrange(1, 12)) for _ in range(60)]
    paths = [save(tmp_path / f"{i}.bmp", size) for i, size in enumerate(sizes)]
    reader, held, lock, most = ImageReader(), [], threading.Lock(), []

    def work(path: Path) -> int:
        with reader.opened(path) as image:
            pixels = image.width * image.height
            with lock:
                held.append(pixels)
                most.append((sum(held), len(held)))
            image.resize((64, 64))
            with lock:
                held.remove(pixels)
            return pixels

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, paths)) == [width * height for width, height in sizes]
    assert all(total <= 100 or count == 1 for total, count in most) and max(total for total, _ in most) > 100
    assert budget._used == 0 and not budget._waiting and not budget._holders


def test_a_picture_waits_until_another_one_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "_budget", read._Budget(60))
    path, reader, order = save(tmp_path / "x.bmp"), ImageReader(), []  # 48 pixels

    def other() -> None:
        with reader.opened(path):
            order.append("other")

    with reader.opened(path):
        with reader.opened(path):  # a thread that holds one does not wait for itself
            thread = threading.Thread(target=other)
            thread.start()
            while thread.is_alive() and not read._budget._waiting:
                pass
        order.append("first")
    thread.join()
    assert order == ["first", "other"]


def test_a_broken_picture_holds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "_budget", read._Budget(60))
    path = save(tmp_path / "x.bmp")
    path.write_bytes(path.read_bytes()[:-40])
    for _ in range(3):
        with pytest.raises(ValueError, match="truncated"):
            load_image(path)
    assert read._budget._used == 0


def test_a_reader_goes_to_another_process(tmp_path: Path) -> None:
    path = tiff(tmp_path / "x.tif", np.full((9, 9), 300, np.int32))
    reader = ImageReader((200, 400), 100)
    copy = pickle.loads(pickle.dumps(reader))
    assert copy.load(path).getpixel((0, 0)) == (128,) * 3
    with pytest.raises(TooManyPixels, match="more than 100 pixels"):
        copy.load(save(tmp_path / "x.png", (11, 11)))


def test_the_first_picture_of_several_is_read(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (6, 4), color) for color in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    for suffix in (".gif", ".png", ".webp", ".tif", ".mpo"):
        path = tmp_path / f"x{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:])
        red, green, blue = load_image(path).getpixel((3, 2))
        assert red > 240 and green < 12 and blue < 12, suffix


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "La"])
@pytest.mark.parametrize(
    "suffix", [".bmp", ".dds", ".gif", ".jp2", ".pcx", ".png", ".ppm", ".qoi", ".tga", ".tif", ".webp"]
)
def test_every_mode_that_a_format_keeps(tmp_path: Path, suffix: str, mode: str) -> None:
    y, x = np.mgrid[:24, :32]
    smooth = np.stack((8 * x, 10 * y, 4 * x + 5 * y, 255 - 8 * x), axis=2).astype(np.uint8)
    image = Image.merge("LAB", Image.fromarray(smooth[..., :3]).split()) if mode == "LAB" else Image.fromarray(smooth)
    if mode == "PA":
        image = image.convert("RGB").quantize(16).convert("PA")
    elif mode == "La":
        image = image.convert("LA").convert("La")
    elif mode not in ("LAB", "RGBA"):
        image = image.convert("LA" if mode == "LA" else "RGB").convert(mode)
    try:
        image.save(tmp_path / f"x{suffix}", **({"lossless": True, "exact": True} if suffix == ".webp" else {}))
        with Image.open(tmp_path / f"x{suffix}") as stored:
            if stored.mode != image.mode:  # the format keeps something else
                return
    except (OSError, ValueError, KeyError):  # or cannot hold such a picture
        return
    if mode in ("LA", "PA", "RGBA", "La"):
        rgba = (image.convert("LA") if mode == "La" else image).convert("RGBA")
        expected = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), rgba).convert("RGB")
    else:
        expected = image.convert("RGB")
    np.testing.assert_array_equal(load_image(tmp_path / f"x{suffix}"), expected)


def test_batches_take_the_options_and_tell_once(tmp_path: Path) -> None:
    work = types.SimpleNamespace(stopping=False, has_results=True, passed=lambda name: None)
    for number in range(5):
        tiff(tmp_path / f"{number}.tif", np.full((9, 9), 900, np.uint16))
    paths = find(str(tmp_path), 0, 0)
    with pytest.warns(UserWarning) as told:
        (pair,) = batches(paths, str(tmp_path), 4, 8, work)
    assert pair[0] == [f"{number}.tif" for number in range(5)] and pair[1].unique().tolist() == [224]
    assert len(told) == 1 and "are taken for 10 bits" in str(told[0].message)
    (pair,) = batches(paths, str(tmp_path), 4, 8, work, value_range=(800, 1000))
    assert pair[1].unique().tolist() == [128]
    work.has_results = False
    with pytest.raises(ValueError, match="none of the 5 images"), pytest.warns(UserWarning, match="--max-pixels N"):
        list(batches(paths, str(tmp_path), 4, 8, work, max_pixels=80))
    with pytest.raises(ValueError, match="value_range must be two finite numbers"):
        list(batches(paths, str(tmp_path), 4, 8, work, value_range=(3, 2)))


def test_a_fifo_by_name_is_no_picture(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.jpg")
    with pytest.raises(ValueError, match=r"x\.jpg is a FIFO, not a folder"):
        find(str(tmp_path / "x.jpg"), 0, 0)
