"""Folders of images: what is found, how every kind of file is read, and what happens to broken ones."""

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from stellar_fast.data import ImageFolder, TooManyUnreadable, load_image


def save(path: Path, color: tuple[int, int, int] = (10, 20, 30), size: tuple[int, int] = (8, 6)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def pixel(path: Path) -> tuple[int, ...]:
    image = load_image(path)
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


def test_finds_nested_images_in_sorted_order(tmp_path: Path) -> None:
    names = ["b/2.JPG", "a/x/1.png", "a/0.webp", "top.bmp"]
    for name in names:
        save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    save(tmp_path / ".cache" / "hidden.png")
    save(tmp_path / "a" / "._resource.png")
    folder = ImageFolder(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in folder.paths] == sorted(names)
    assert len(folder) == 4 and folder.classes == [] and folder[0].size == (8, 6)
    assert folder[-1].size == (8, 6)
    with pytest.raises(IndexError, match="index 4 is out of range for 4 images"):
        folder[4]


def test_labels_are_top_folders(tmp_path: Path) -> None:
    for name in ("dog/a.png", "cat/deep/b.png", "cat/c.png"):
        save(tmp_path / name)
    folder = ImageFolder(tmp_path, labels=True)
    assert folder.classes == ["cat", "dog"]
    assert [folder[i][1] for i in range(3)] == [0, 0, 1]
    stray = save(tmp_path / "stray.png")
    with pytest.raises(ValueError, match=str(stray)):
        ImageFolder(tmp_path, labels=True)


def test_missing_and_empty_folders_raise(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        ImageFolder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no images"):
        ImageFolder(tmp_path)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 4), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").size == (4, 8)


def test_every_kind_of_pixel_becomes_rgb(tmp_path: Path) -> None:
    def stored(image: Image.Image, name: str, **options: object) -> tuple[int, ...]:
        image.save(tmp_path / name, **options)
        return pixel(tmp_path / name)

    assert stored(Image.new("L", (4, 4), 77), "grey.png") == (77, 77, 77)
    assert stored(Image.new("1", (4, 4), 1), "bilevel.png") == (255, 255, 255)
    assert stored(Image.new("RGBA", (4, 4), (200, 0, 0, 255)), "opaque.png") == (200, 0, 0)
    assert stored(Image.new("RGBA", (4, 4), (200, 0, 0, 0)), "transparent.png") == (255, 255, 255)
    assert stored(Image.new("LA", (4, 4), (0, 127)), "half.png") == (128, 128, 128)
    assert stored(Image.new("CMYK", (4, 4), (0, 0, 0, 255)), "cmyk.tif") == (0, 0, 0)
    assert max(stored(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "cmyk.jpg")[:1]) < 60

    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    assert stored(palette, "palette.png") == (9, 8, 7)
    assert stored(palette, "palette_transparent.png", transparency=1) == (255, 255, 255)

    for level, expected in ((0, 0), (257, 1), (32896, 128), (65535, 255)):
        deep = Image.fromarray(np.full((4, 4), level, np.uint16))
        assert stored(deep, "deep.png") == (expected,) * 3
        assert stored(deep, "deep.tif") == (expected,) * 3
    assert stored(Image.fromarray(np.full((4, 4), 0.5, np.float32)), "unit.tif") == (128, 128, 128)
    assert stored(Image.fromarray(np.full((4, 4), 100.0, np.float32)), "bytes.tif") == (100, 100, 100)
    assert stored(Image.fromarray(np.full((4, 4), 70000, np.int32)), "int32.tif") == (255, 255, 255)

    frames = [Image.new("RGB", (4, 4), (255, 0, 0)), Image.new("RGB", (4, 4), (0, 0, 255))]
    assert stored(frames[0], "animated.gif", save_all=True, append_images=frames[1:]) == (255, 0, 0)


def test_links_back_up_are_searched_once(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "a" / "0.png")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "again").symlink_to(tmp_path / "a")
    assert len(ImageFolder(tmp_path)) == 1


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif", ".gif", ".bmp"])
def test_broken_files_raise_with_their_path(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"photo{suffix}"
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    whole = path.read_bytes()
    for broken in (b"", b"not an image at all", whole[:20], whole[: len(whole) // 2]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=f"cannot read image .*photo{suffix}"):
            load_image(path)
    with pytest.raises(ValueError, match=r"absent\.png"):
        load_image(tmp_path / "absent.png")


def make_broken(tmp_path: Path, good: int, bad: list[int]) -> None:
    for number in range(good + len(bad)):
        path = tmp_path / f"{number:03}.png"
        if number in bad:
            path.write_bytes(b"broken")
        else:
            save(path, (number, 0, 0))


def test_an_unreadable_file_is_logged_once_and_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_broken(tmp_path, good=18, bad=[3, 7])
    folder = ImageFolder(tmp_path, max_failed_share=0.1)
    with caplog.at_level(logging.WARNING):
        first = [folder[i].getpixel((0, 0))[0] for i in range(20)]
        again = [folder[i].getpixel((0, 0))[0] for i in reversed(range(20))]
    assert first == again[::-1]
    assert [n for n in range(20) if first[n] != n] == [3, 7] and not {first[3], first[7]} & {3, 7}
    assert sorted(path.name for path in folder.failed) == ["003.png", "007.png"]
    assert len(caplog.records) == 2 and "003.png" in caplog.text and "007.png" in caplog.text
    assert ImageFolder(tmp_path, max_failed_share=0.1)[7].getpixel((0, 0))[0] == first[7]


def test_too_many_unreadable_files_end_the_run(tmp_path: Path) -> None:
    make_broken(tmp_path, good=18, bad=[3, 7])
    folder = ImageFolder(tmp_path, max_failed_share=0.05)
    with pytest.raises(TooManyUnreadable, match=r"2 of 20 images .* allowed share of 0.05; .*00[37].png"):
        [folder[i] for i in range(20)]


def test_a_folder_of_broken_files_ends(tmp_path: Path) -> None:
    make_broken(tmp_path, good=0, bad=[0, 1, 2])
    with pytest.raises(TooManyUnreadable, match="3 of 3"):
        ImageFolder(tmp_path, max_failed_share=1.0)[0]


def test_labels_follow_the_replacement(tmp_path: Path) -> None:
    for name in ("a/0.png", "b/1.png", "b/2.png"):
        save(tmp_path / name, (int(name[2]), 0, 0))
    (tmp_path / "a" / "0.png").write_bytes(b"broken")
    image, label = ImageFolder(tmp_path, labels=True, max_failed_share=0.5)[0]
    assert image.getpixel((0, 0))[0] in (1, 2) and label == 1


def test_worker_processes_replace_alike(tmp_path: Path) -> None:
    make_broken(tmp_path, good=18, bad=[3, 7])
    folder = ImageFolder(tmp_path)
    reds = [
        [image.getpixel((0, 0))[0] for image in DataLoader(folder, batch_size=None, num_workers=workers)]
        for workers in (0, 2)
    ]
    assert reds[0] == reds[1]
