"""Numbers of more than 8 bits: the same pixels from any container, whatever outliers there are; and what is told."""

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stellar_fast.data import ImageReader, load_image
from tests.data.containers import chunk, png, ppm, tiff


def saved(path: Path, pixels: np.ndarray) -> Path:
    Image.fromarray(pixels).save(path)
    return path


def pillow_tiff(path: Path, pixels: np.ndarray) -> Path:
    return saved(path.with_suffix(".tif"), pixels)


# What writes grey numbers up to 65,535 as a file.
CONTAINERS: dict[str, Callable[[Path, np.ndarray], Path]] = {
    "png I;16": lambda path, x: png(path, x),
    "png LA": lambda path, x: png(path, np.dstack([x, np.full_like(x, 65535)])),
    "png RGB": lambda path, x: png(path, np.dstack([x, x, x])),
    "png RGBA": lambda path, x: png(path, np.dstack([x, x, x, np.full_like(x, 65535)])),
    "tiff RGB": lambda path, x: tiff(path, np.dstack([x, x, x]).astype(np.uint16)),
    "tiff RGB big": lambda path, x: tiff(path, np.dstack([x, x, x]).astype(np.uint16), order=">"),
    "tiff RGB deflate": lambda path, x: tiff(path, np.dstack([x, x, x]).astype(np.uint16), deflate=True),
    "tiff RGBA": lambda path, x: tiff(path, np.dstack([x, x, x, np.full_like(x, 65535)]).astype(np.uint16)),
    "pgm": lambda path, x: saved(path.with_suffix(".pgm"), x.astype(np.uint16)),
    "ppm": lambda path, x: ppm(path, np.dstack([x, x, x])),
    "pfm": lambda path, x: saved(path.with_suffix(".pfm"), x.astype(np.float32)),
    "jp2": lambda path, x: saved(path.with_suffix(".jp2"), x.astype(np.uint16)),
    "tiff Pillow I": lambda path, x: pillow_tiff(path, x.astype(np.int32)),
    "tiff Pillow F": lambda path, x: pillow_tiff(path, x.astype(np.float32)),
    "tiff Pillow I;16B": lambda path, x: pillow_tiff(path, x.astype(">u2")),
}
for dtype in ("uint16", "int32", "uint32", "float32"):
    for order, deflate in (("<", False), (">", False), ("<", True), (">", True)):
        if dtype != "uint32" or order == "<":  # Pillow reads no such big-endian ones
            name = f"tiff {dtype} {order}{' deflate' if deflate else ''}"
            CONTAINERS[name] = lambda path, x, dtype=dtype, order=order, deflate=deflate: tiff(
                path, x.astype(dtype), order=order, deflate=deflate
            )


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.filterwarnings("ignore:.*sets one range for all files")
def test_the_same_numbers_give_the_same_pixels(tmp_path: Path, container: str) -> None:
    for bits in (8, 10, 12, 14, 16):
        ramp = np.linspace(0, 2**bits - 1, 20 * 30).round().reshape(20, 30).astype(np.int64)
        expected = np.floor(ramp * 255 / (2**bits - 1) + 0.5)
        got = np.asarray(load_image(CONTAINERS[container](tmp_path / "x", ramp)))
        assert got.shape == (20, 30, 3), bits
        for channel in range(3):
            np.testing.assert_array_equal(got[..., channel], expected, err_msg=f"{container}, {bits} bits")


@pytest.mark.parametrize("dtype", ["int32", "uint32", "float32"])
def test_wider_numbers_take_the_next_even_number_of_bits(tmp_path: Path, dtype: str) -> None:
    for top, bits in ((70_000, 18), (2**20 - 1, 20), (2**24 - 256, 24), (2**31 - 128, 32)):
        ramp = np.linspace(0, top, 900).reshape(30, 30).astype(dtype)
        got = np.asarray(load_image(tiff(tmp_path / "x.tif", ramp)))[..., 0]
        np.testing.assert_array_equal(got, np.floor(ramp.astype(np.float64) * 255 / (2**bits - 1) + 0.5))
    if dtype == "uint32":
        ramp = np.linspace(0, 2**32 - 1, 900).reshape(30, 30).astype(dtype)
        got = np.asarray(load_image(tiff(tmp_path / "x.tif", ramp)))[..., 0]
        np.testing.assert_array_equal(got, np.floor(ramp.astype(np.float64) / (2**32 - 1) * 255 + 0.5))


def test_signed_16_bits(tmp_path: Path) -> None:
    ramp = np.linspace(0, 32767, 900).reshape(30, 30).astype(np.int16)
    for order in "<>":
        for deflate in (False, True):
            got = np.asarray(load_image(tiff(tmp_path / "x.tif", ramp, order=order, deflate=deflate)))[..., 0]
            np.testing.assert_array_equal(got, np.floor(ramp * np.float64(255) / 65535 + 0.5))


def test_two_12_bit_textures_differ_as_their_8_bit_copies_do(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    with pytest.warns(UserWarning, match="taken for 12 bits"):
        for _ in range(2):
            eight = draw.integers(0, 256, (32, 32, 3)).astype(np.uint16)
            twelve = (eight * 4095.0 / 255).round().astype(np.uint16)
            for path in (png(tmp_path / "x.png", twelve), tiff(tmp_path / "x.tif", twelve)):
                np.testing.assert_array_equal(load_image(path), eight)


def test_colours_share_one_range(tmp_path: Path) -> None:
    pixels = np.zeros((10, 10, 3), np.uint16)
    pixels[:] = (4095, 1000, 16)
    with pytest.warns(
        UserWarning, match="its values end at 4,095, within an eighth of 16 bits, and are taken for 12 bits"
    ):
        assert load_image(png(tmp_path / "x.png", pixels)).getpixel((5, 5)) == (255, 62, 1)


def fraction(size: int) -> np.ndarray:
    return np.linspace(0, 1, size * size, dtype=np.float32).reshape(size, size)


@pytest.mark.parametrize("size", [8, 40])
@pytest.mark.parametrize("outlier", [1.02, 300.0, 1e30, np.nan, np.inf, -np.inf, -5.0])
def test_one_outlier_changes_its_own_pixel_alone(tmp_path: Path, size: int, outlier: float) -> None:
    for top in (1, 255, 4095):
        pixels = fraction(size) * np.float32(top)
        expected = np.floor(pixels.astype(np.float64) * 255 / top + 0.5)
        pixels[2, 3] = outlier * top
        expected[2, 3] = 255 if outlier > 1 else 0
        np.testing.assert_array_equal(np.asarray(load_image(tiff(tmp_path / "x.tif", pixels)))[..., 0], expected)


@pytest.mark.filterwarnings("ignore:.*sets one range for all files")
def test_hot_pixels_do_not_darken_a_12_bit_picture(tmp_path: Path) -> None:
    pixels = np.linspace(0, 4095, 3600).round().reshape(60, 60).astype(np.uint16)
    expected = np.floor(pixels * 255.0 / 4095 + 0.5)
    pixels[0, :3], expected[0, :3] = 65535, 255
    np.testing.assert_array_equal(np.asarray(load_image(png(tmp_path / "x.png", pixels)))[..., 0], expected)
    colours = np.dstack([pixels] * 3)
    np.testing.assert_array_equal(np.asarray(load_image(png(tmp_path / "x.png", colours)))[..., 2], expected)


def test_a_small_picture_keeps_all_its_values(tmp_path: Path) -> None:
    pixels = np.array([[0, 256], [32896, 65535]], np.uint16)
    np.testing.assert_array_equal(np.asarray(load_image(png(tmp_path / "x.png", pixels)))[..., 0], [[0, 1], [128, 255]])


def test_a_little_above_a_range_is_still_in_it(tmp_path: Path) -> None:
    pixels = fraction(30) * np.float32(258)  # as resampling overshoots
    got = np.asarray(load_image(tiff(tmp_path / "x.tif", pixels)))[..., 0]
    np.testing.assert_array_equal(got, np.floor(pixels.clip(0, 255) + 0.5))


def test_negative_numbers(tmp_path: Path) -> None:
    ramp = np.linspace(-1024, 3071, 900).reshape(30, 30)
    for pixels in (ramp.astype(np.int16), ramp.astype(np.int32), ramp.astype(np.float32)):
        path = tiff(tmp_path / "x.tif", pixels)
        with pytest.warns(
            UserWarning, match=r"x.tif: 25.0% of its values are negative and become black; --value-range"
        ):
            got = np.asarray(load_image(path))[..., 0]
        np.testing.assert_array_equal(got, np.floor(pixels.astype(np.float64).clip(0) * 255 / 4095 + 0.5))
        got = np.asarray(load_image(path, value_range=(-1024, 3071)))[..., 0]
        np.testing.assert_array_equal(got, np.floor((pixels.astype(np.float64) + 1024) * 255 / 4095 + 0.5))
        with pytest.raises(
            ValueError, match=r"x.tif: 75% of its values are negative .* from -3,071 to 1,024; --value-"
        ):
            load_image(tiff(tmp_path / "x.tif", -pixels))


def test_no_finite_number_is_an_error(tmp_path: Path) -> None:
    path = tiff(tmp_path / "x.tif", np.full((4, 4), np.nan, np.float32))
    with pytest.raises(ValueError, match=r"x.tif: none of its values is a finite number"):
        load_image(path)


def test_a_range_is_a_linear_map(tmp_path: Path) -> None:
    numbers = np.array([[0, 99, 100, 101], [150, 299, 300, 65535]], np.int64)
    expected = np.array([[0, 0, 0, 1], [64, 254, 255, 255]])  # 101: 1.275; 150: 63.75; 299: 253.725
    for write in CONTAINERS.values():
        got = np.asarray(load_image(write(tmp_path / "x", numbers), value_range=(100, 300)))
        np.testing.assert_array_equal(got, np.dstack([expected] * 3))


def test_a_range_holds_for_8_bits_too(tmp_path: Path) -> None:
    pixels = np.array([[[0, 10, 20], [30, 40, 255]]], np.uint8)
    expected = np.array([[[0, 0, 85], [170, 255, 255]]])
    for name in ("x.png", "x.bmp", "x.tif"):
        got = load_image(saved(tmp_path / name, pixels), value_range=(10, 40))
        np.testing.assert_array_equal(np.asarray(got), expected)
    alpha = np.dstack([pixels, np.array([[255, 0]], np.uint8)])
    got = np.asarray(load_image(saved(tmp_path / "x.png", alpha), value_range=(10, 40)))
    np.testing.assert_array_equal(got, [[[0, 0, 85], [255, 255, 255]]])


@pytest.mark.parametrize("value_range", [(1, 1), (2, 1), (0, float("inf")), (float("nan"), 1)])
def test_a_range_that_is_none_raises(tmp_path: Path, value_range: tuple[float, float]) -> None:
    path = saved(tmp_path / "x.png", np.zeros((2, 2), np.uint8))
    with pytest.raises(ValueError, match="value_range must be two finite numbers, the smaller one first, but is"):
        load_image(path, value_range=value_range)


def test_transparent_numbers_of_16_bits_are_white(tmp_path: Path) -> None:
    grey = np.array([[0, 30000], [30001, 65535]], np.uint16)
    path = png(tmp_path / "x.png", grey, chunk(b"tRNS", np.array([30000], ">u2").tobytes()))
    np.testing.assert_array_equal(np.asarray(load_image(path))[..., 0], [[0, 255], [117, 255]])
    colours = np.array([[[300, 1, 2], [300, 1, 3], [65535, 0, 0]]], np.uint16)
    path = png(tmp_path / "x.png", colours, chunk(b"tRNS", np.array([300, 1, 2], ">u2").tobytes()))
    np.testing.assert_array_equal(np.asarray(load_image(path)), [[[255, 255, 255], [1, 0, 0], [255, 0, 0]]])
    half = np.array([[[65535, 0, 0, 0], [65535, 0, 0, 65535]]], np.uint16)
    np.testing.assert_array_equal(np.asarray(load_image(png(tmp_path / "x.png", half))), [[[255] * 3, [255, 0, 0]]])


def test_a_tiff_that_counts_from_white(tmp_path: Path) -> None:
    for dtype, top in ((np.uint8, 255), (np.uint16, 65535), (np.float32, 1)):
        ramp = np.linspace(0, top, 100).reshape(10, 10).astype(dtype)
        got = np.asarray(load_image(tiff(tmp_path / "x.tif", ramp, zero_is_white=True)))[..., 0]
        np.testing.assert_array_equal(got, 255 - np.floor(ramp.astype(np.float64) * 255 / top + 0.5))


def test_what_pillow_garbles_is_refused(tmp_path: Path) -> None:
    pixels = np.zeros((4, 4, 3), np.uint16)
    for deflate in (False, True):
        with pytest.raises(ValueError, match="its 16-bit colours are stored in separate planes, which is not read"):
            load_image(tiff(tmp_path / "x.tif", pixels, planes=True, deflate=deflate))


def test_each_kind_of_doubt_is_told_once(tmp_path: Path) -> None:
    said: list[str] = []
    reader = ImageReader(tell=said.append)
    for name in ("a", "b"):
        reader.load(png(tmp_path / f"{name}.png", np.full((9, 9), 4095, np.uint16)))
        reader.load(tiff(tmp_path / f"{name}.tif", np.full((9, 9), 0.1, np.float32)))
        reader.load(tiff(tmp_path / f"{name}.tiff", np.linspace(-1, 9, 900, dtype=np.float32).reshape(30, 30)))
    assert len(said) == 3
    assert said[0].startswith(
        f"{tmp_path}/a.png: its values end at 4,095, within an eighth of 16 bits, and are taken for 12 "
    )
    assert said[1].startswith(
        f"{tmp_path}/a.tif: its values end at 0.1, within an eighth of the range from 0 to 1; --value-r"
    )
    assert said[2].startswith(
        f"{tmp_path}/a.tiff: 10.0% of its values are negative and become black; --value-range LO HI"
    )
    assert all(text.endswith("Other files like it are not told.") for text in said)


def test_nothing_is_told_of_files_that_use_their_range(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for top in (8192, 16383, 65535):
            load_image(png(tmp_path / "x.png", np.full((9, 9), top, np.uint16)))
        load_image(png(tmp_path / "x.png", np.zeros((9, 9), np.uint16)))  # black
        load_image(tiff(tmp_path / "x.tif", fraction(9)))
        load_image(saved(tmp_path / "x.pgm", np.full((9, 9), 40000, np.uint16)))
        load_image(saved(tmp_path / "x.png", np.full((9, 9), 3, np.uint8)))
        load_image(saved(tmp_path / "x.png", np.full((9, 9), 3, np.uint8)), value_range=(0, 20))
    with pytest.warns(UserWarning, match=r"its values end at 200, within an eighth of the range from 0 to 4,095"):
        load_image(saved(tmp_path / "x.png", np.full((9, 9), 200, np.uint8)), value_range=(0, 4095))
