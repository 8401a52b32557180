"""Orientation is applied where it is legible, and nothing else beside the pixels matters, however damaged it is."""

import io
import random
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from stellar_fast.data import load_image
from tests.data.containers import Entry, chunk, exif, png, tiff

TURNS: list[Callable[[np.ndarray], np.ndarray]] = [  # by orientation less 1
    lambda x: x,
    lambda x: x[:, ::-1],
    lambda x: x[::-1, ::-1],
    lambda x: x[::-1],
    lambda x: x.swapaxes(0, 1),
    lambda x: x[::-1].swapaxes(0, 1),
    lambda x: x[::-1, ::-1].swapaxes(0, 1),
    lambda x: x[:, ::-1].swapaxes(0, 1),
]
SIX: Entry = (0x0112, 3, 1, b"\6\0")
XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
# What made healthy pictures unreadable, in a directory that asks for orientation 6.
DAMAGED: dict[str, bytes] = {
    "a negative rational": exif(SIX, (0x011A, 10, 1, b"\x26")) + struct.pack("<ii", -1, 2),
    "a rational by zero": exif(SIX, (0x011A, 5, 1, b"\x26")) + struct.pack("<II", 1, 0),
    "text where a number belongs": exif(SIX, (0x011A, 2, 4, b"abcd"), (0x0128, 2, 4, b"abcd")),
    "no numbers": exif(SIX, (0x011A, 5, 0, b""), (0x0128, 3, 1, b"\2")),
    "a type too wide": exif(SIX, (0x9003, 12, 1, b"\3"), (0x011A, 16, 1, b"\3")),
    "a type that is none": exif(SIX, (0x011A, 200, 1, b"\3")),
    "a sub-directory of text": exif(SIX, (0x8769, 2, 4, b"abcd"), (0x8825, 2, 4, b"abcd")),
    "a sub-directory nowhere": exif(SIX, (0x8769, 4, 1, b"\xff\xff\xff\x7f"), (0x8825, 4, 1, b"\xff\xff\xff\xff")),
    "a sub-directory in a circle": exif(SIX, (0x8769, 4, 1, b"\x08")),
    "a huge count": exif(SIX, (0x010F, 2, 2**32 - 1, b"\x08")),
    "a huge number of entries": exif(SIX).replace(b"\1\0\x12\1", b"\xff\xff\x12\1"),
    "a directory cut off": exif(SIX)[:-4],
}
# Where it is illegible, the picture stays as it is stored.
ILLEGIBLE: dict[str, bytes] = {
    "a wrong magic": b"Exif\0\0XX*\0" + exif(SIX)[10:],
    "nothing": b"Exif\0\0",
    "a directory nowhere": b"Exif\0\0II*\0\xff\xff\xff\xff" + exif(SIX)[14:],
    "orientation 0": exif((0x0112, 3, 1, b"\0")),
    "orientation 9": exif((0x0112, 3, 1, b"\x09")),
    "an orientation of text": exif((0x0112, 2, 2, b"6")),
    "a rational orientation": exif((0x0112, 5, 1, b"\x08")),
    "orientations elsewhere": exif((0x0112, 3, 70_000, b"\6\0")),
    "an entry cut off": exif(SIX)[:20],
}


def picture(channels: int = 3) -> np.ndarray:
    """(16, 24, channels) uint8: smooth, and different in each orientation."""
    y, x = np.mgrid[:16, :24]
    return np.stack((8 * x, 12 * y, 5 * x + 6 * y)[:channels], axis=2).astype(np.uint8)


def with_exif(path: Path, block: bytes) -> np.ndarray:
    """Write the picture with a block of EXIF; what is seen where that asks for nothing."""
    image = Image.fromarray(picture())
    if path.suffix == ".png":
        stream = io.BytesIO()
        image.save(stream, "PNG")
        whole, place = stream.getvalue(), 8 + 25  # after IHDR
        path.write_bytes(whole[:place] + chunk(b"eXIf", block[6:]) + whole[place:])
    elif path.suffix in (".tif", ".tiff"):
        raise AssertionError("a TIFF has no block")
    else:
        image.save(path, exif=block, **({"lossless": True} if path.suffix == ".webp" else {}))
    stream = io.BytesIO()
    if path.suffix != ".jpg":
        return picture()
    image.save(stream, "JPEG")
    return np.asarray(Image.open(stream))


def quietly(path: Path) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return np.asarray(load_image(path))


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_each_orientation_is_applied(tmp_path: Path, suffix: str) -> None:
    for order in "<>":
        for kind, code in ((1, "B"), (3, "H"), (4, "I"), (9, "i")):
            for orientation, turn in enumerate(TURNS, start=1):
                block = exif((0x0112, kind, 1, struct.pack(f"{order}{code}", orientation)), order=order)
                stored = with_exif(tmp_path / f"x{suffix}", block)
                np.testing.assert_array_equal(quietly(tmp_path / f"x{suffix}"), turn(stored))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("deflate", [False, True])
def test_each_orientation_of_a_tiff_is_applied(tmp_path: Path, order: str, dtype: type, deflate: bool) -> None:
    stored = picture(1)[..., 0]
    numbers = stored.astype(dtype) if dtype != np.uint16 else stored.astype(np.uint16) * 257
    for orientation, turn in enumerate(TURNS, start=1):
        entry = (0x0112, 3, 1, struct.pack(f"{order}H", orientation))
        path = tiff(tmp_path / "x.tif", numbers, entry, order=order, deflate=deflate)
        np.testing.assert_array_equal(quietly(path)[..., 0], turn(stored))


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_damage_elsewhere_leaves_the_orientation(tmp_path: Path, suffix: str, damage: str) -> None:
    stored = with_exif(tmp_path / f"x{suffix}", DAMAGED[damage])
    np.testing.assert_array_equal(quietly(tmp_path / f"x{suffix}"), TURNS[5](stored))


@pytest.mark.parametrize("damage", ILLEGIBLE)
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_an_illegible_orientation_is_none(tmp_path: Path, suffix: str, damage: str) -> None:
    stored = with_exif(tmp_path / f"x{suffix}", ILLEGIBLE[damage])
    np.testing.assert_array_equal(quietly(tmp_path / f"x{suffix}"), stored)


def test_any_bytes_of_exif_may_be_wrong(tmp_path: Path) -> None:
    rich = Image.Exif()
    rich[0x0112], rich[0x010F], rich[0x011A], rich[0x0128], rich[0x0132] = 6, "maker", 72.0, 2, "2020:01:01 00:00:00"
    rich.get_ifd(ExifTags.IFD.Exif)[0x9003] = "2020:01:01 00:00:00"
    rich.get_ifd(ExifTags.IFD.GPSInfo)[2] = (1.0, 2.0, 3.0)
    block = rich.tobytes()
    entries_end = 6 + 8 + 2 + 12 * len(rich)
    draw = random.Random(0)
    for suffix, tries in ((".jpg", 500), (".png", 150), (".webp", 60)):
        seen = set()
        for _ in range(tries):
            wrong = bytearray(block)
            first = draw.choice((6, entries_end))
            for _ in range(draw.choice((1, 1, 3, 20))):
                wrong[draw.randrange(first, len(wrong))] = draw.choice((0, 0xFF, draw.randrange(256)))
            if draw.random() < 0.1:
                del wrong[draw.randrange(max(first, 12), len(wrong)) :]
            path = tmp_path / f"x{suffix}"
            stored, got = with_exif(path, bytes(wrong)), quietly(tmp_path / f"x{suffix}")
            if first == entries_end:  # the directory itself is whole
                np.testing.assert_array_equal(got, TURNS[5](stored), err_msg=wrong.hex())
            shown = [i for i, turn in enumerate(TURNS, 1) if np.array_equal(got, turn(stored))]
            assert shown, wrong.hex()
            seen.update(shown)
        assert {1, 6} <= seen


def test_a_png_with_wrong_sums_and_other_damage_beside_its_pixels(tmp_path: Path) -> None:
    stored = (picture().astype(np.uint16) * 257)[..., 0]
    for kind in (
        b"eXIf",
        b"tEXt",
        b"zTXt",
        b"iTXt",
        b"iCCP",
        b"pHYs",
        b"gAMA",
        b"cHRM",
        b"sRGB",
        b"acTL",
        b"tIME",
        b"zzZz",
    ):
        for data in (b"", b"\0", b"x", b"x\0\7damaged", bytes(40)):
            good = chunk(kind, data)
            for block in (good, good[:-1] + bytes((good[-1] ^ 1,))):
                np.testing.assert_array_equal(quietly(png(tmp_path / "x.png", stored, block))[..., 0], stored // 257)


def test_exif_in_a_text_of_png(tmp_path: Path) -> None:
    stored = (picture().astype(np.uint16) * 257)[..., 0]
    block = exif(SIX)
    text = f"\nexif\n{len(block):8}\n{block.hex()}\n".encode()
    for part in (
        chunk(b"tEXt", b"Raw profile type exif\0" + text),
        chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text)),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP),
    ):
        np.testing.assert_array_equal(quietly(png(tmp_path / "x.png", stored, part))[..., 0], TURNS[5](stored // 257))
    for damaged in (text.replace(b"4578", b"45zz"), text[:30]):
        path = png(tmp_path / "x.png", stored, chunk(b"tEXt", b"Raw profile type exif\0" + damaged))
        np.testing.assert_array_equal(quietly(path)[..., 0], stored // 257)


def segment(marker: int, data: bytes) -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", len(data) + 2) + data


def test_damaged_segments_of_a_jpeg(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    stored = with_exif(path, b"")
    whole = path.read_bytes()
    for data, turn in (
        (b"ICC_PROFILE\0", 1),
        (b"ICC_PROFILE\0\1\2" + bytes(9), 1),
        (b"MPF\0", 1),
        (b"MPF\0II*\0\x08\0\0\0\xff\xff", 1),
        (b"Photoshop 3.0\0" + b"8BIM\x03\xed\xff\xff", 1),
        (b"http://ns.adobe.com/xap/1.0/\0" + XMP, 6),
        (b"http://ns.adobe.com/xap/1.0/\0" + XMP.replace(b'="6"', b">6<"), 6),
        (b"http://ns.adobe.com/xap/1.0/\0" + XMP.replace(b"6", b"9"), 1),
        (b"", 1),
    ):
        for marker in (0xE1, 0xE2, 0xED):
            path.write_bytes(whole[:2] + segment(marker, data) + whole[2:])
            expected = TURNS[turn - 1](stored) if marker == 0xE1 else stored
            np.testing.assert_array_equal(quietly(path), expected)
    path.write_bytes(whole[:2] + segment(0xE1, exif(SIX)) + segment(0xE1, b"\0" * 70) + b"\xff" + whole[2:])
    np.testing.assert_array_equal(quietly(path), TURNS[5](stored))


def test_damaged_tags_of_a_tiff(tmp_path: Path) -> None:
    stored = picture(1)[..., 0]
    for order in "<>":
        for damaged in (
            [(282, 2, 4, b"abcd"), (283, 2, 4, b"abcd"), (296, 3, 1, struct.pack(f"{order}H", 3))],
            [(282, 10, 1, b"\xff\xff\xff\xff")],
            [(270, 2, 2**32 - 1, b"")],
            [(34665, 2, 4, b"abcd")],
            [(34665, 4, 1, struct.pack(f"{order}I", 8))],
            [(34853, 4, 1, b"\xff\xff\xff\xff")],
            [(34377, 7, 2, b"8B")],
            [(700, 2, 4, b"abcd")],
            [(34675, 7, 9, b"\xff\xff\xff\xff")],
            [(65000, 300, 70_000, b"\xff\xff\xff\xff")],
        ):
            for deflate in (False, True):
                path = tiff(tmp_path / "x.tif", stored, *damaged, order=order, deflate=deflate)
                np.testing.assert_array_equal(quietly(path)[..., 0], stored)
                orientation = (0x0112, 3, 1, struct.pack(f"{order}H", 6))
                path = tiff(tmp_path / "x.tif", stored, orientation, *damaged, order=order, deflate=deflate)
                np.testing.assert_array_equal(quietly(path)[..., 0], TURNS[5](stored))


def test_an_orientation_in_the_xmp_of_a_tiff(tmp_path: Path) -> None:
    stored = picture(1)[..., 0]
    path = tiff(tmp_path / "x.tif", stored, (700, 1, len(XMP), b""))
    whole = path.read_bytes()
    entry = struct.pack("<HHI", 700, 1, len(XMP))
    path.write_bytes(whole.replace(entry + bytes(4), entry + struct.pack("<I", len(whole))) + XMP)
    np.testing.assert_array_equal(quietly(path)[..., 0], TURNS[5](stored))


def test_avif_is_turned_as_its_container_says(tmp_path: Path) -> None:
    path = tmp_path / "x.avif"
    Image.fromarray(picture()).save(path, quality=100, subsampling="4:4:4")
    stored = quietly(path)
    Image.fromarray(picture()).save(path, quality=100, subsampling="4:4:4", exif=exif(SIX, (0x010F, 2, 4, b"abc")))
    np.testing.assert_array_equal(quietly(path), TURNS[5](stored))
    whole = path.read_bytes()
    assert whole.count(b"II*\0") == 1
    path.write_bytes(whole.replace(b"II*\0", b"XX\xff\xff"))
    np.testing.assert_array_equal(quietly(path), TURNS[5](stored))
