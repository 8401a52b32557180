"""Folders of images: what is found and how it is kept, how files are read, and what happens to broken ones."""

import gc
import hashlib
import logging
import os
import pickle
import sys
import tracemalloc
import warnings
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

    frames = [Image.new("RGB", (4, 4), (255, 0, 0)), Image.new("RGB", (4, 4), (0, 0, 255))]
    assert stored(frames[0], "animated.gif", save_all=True, append_images=frames[1:]) == (255, 0, 0)


def test_links_back_up_are_searched_once(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "a" / "0.png")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "again").symlink_to(tmp_path / "a")
    assert len(ImageFolder(tmp_path)) == 1


def test_the_order_is_that_of_paths(tmp_path: Path) -> None:
    names = ["a/b.jpg", "a-b.jpg", "a b/c.jpg", "a.jpg", "a/b/c.jpg", "a/b-c.jpg", "a0.jpg", "A.jpg", "a/B.jpg"]
    names += ["\u00e4.jpg", "\U0001f600.jpg", "\uffee.jpg", os.fsdecode(b"\xff.jpg"), os.fsdecode(b"a/\xe4/x.jpg")]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    paths = ImageFolder(tmp_path).paths
    expected = sorted(tmp_path / name for name in names)
    assert paths == expected and list(paths) == expected and paths[3:8] == expected[3:8]
    assert paths[::-2] == expected[::-2] and paths[-1] == expected[-1] and paths != expected[::-1]
    assert expected[2] in paths and paths.index(expected[2]) == 2 and len(paths[: len(names) + 9]) == len(names)
    assert {os.fsencode(path) for path in paths} == {os.fsencode(tmp_path / name) for name in names}
    with pytest.raises(IndexError):
        paths[len(names)]


@pytest.mark.parametrize("root", ["", ".", "..", "deep/../deep", "absolute"])
def test_the_fingerprint_is_that_of_the_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: str) -> None:
    for names in (
        ["x/a.jpg"],
        ["x/y/a.jpg", "x/y/b.jpg"],
        ["x/a.jpg", "x/y/a.jpg"],
        ["b.jpg", "a/c.jpg", "ab/\u00e4.jpg"],
    ):
        place = tmp_path / str(len(names)) / names[0].replace("/", "-")
        for name in names:
            (place / "deep" / name).parent.mkdir(parents=True, exist_ok=True)
            (place / "deep" / name).touch()
        (place / "deep" / "beside").mkdir()
        monkeypatch.chdir(place / {"": ".", ".": "deep", "..": "deep/beside"}.get(root, "."))
        folder = ImageFolder({"": "deep", "absolute": place / "deep"}.get(root, root))
        paths = [str(path) for path in folder.paths]
        shared = os.path.commonpath([os.path.dirname(path) for path in paths])
        text = "\n".join(os.path.relpath(path, shared) for path in paths)
        assert folder.fingerprint == hashlib.sha256(text.encode()).hexdigest()[:16]
        assert folder.fingerprint == folder.paths.fingerprint()


def test_a_fingerprint_of_names_that_are_no_utf8(tmp_path: Path) -> None:
    for name in (b"\xff.jpg", b"\xfe.jpg"):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).touch()
    assert ImageFolder(tmp_path).fingerprint == hashlib.sha256(b"\xfe.jpg\n\xff.jpg").hexdigest()[:16]


def test_what_systems_make_is_passed_by(tmp_path: Path) -> None:
    for name in ("@eaDir/a.jpg", "x/@eaDir/a.jpg", "__MACOSX/a.jpg", "$RECYCLE.BIN/a.jpg", "#recycle/a.jpg"):
        save(tmp_path / name)
    for name in ("lost+found/a.jpg", "System Volume Information/a.jpg", ".Trash-0/a.jpg", "x/._a.jpg", "x/real.jpg"):
        save(tmp_path / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ImageFolder(tmp_path).paths == [tmp_path / "x/real.jpg"]
        assert ImageFolder(tmp_path / "@eaDir").paths == [tmp_path / "@eaDir/a.jpg"]  # where it is asked for


def test_one_line_tells_what_was_not_looked_at(tmp_path: Path) -> None:
    save(tmp_path / "a.jpg")
    for ending, count in {".heic": 4, ".txt": 3, ".JSON": 2, ".json": 1, "": 2, ".xml": 2, ".csv": 1, ".db": 1}.items():
        for number in range(count):
            (tmp_path / f"{number}{ending}").touch()
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "broken.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "circle.jpg").symlink_to("circle.jpg")
    (tmp_path / ".hidden.txt").touch()
    with pytest.warns(UserWarning) as told:
        folder = ImageFolder(tmp_path)
    assert folder.paths == [tmp_path / "a.jpg"]
    (line,) = {str(warning.message) for warning in told}
    assert line == (
        f"not looked at in {tmp_path}: 4 .heic (no reader is installed: pip install pillow-heif), 3 .json, 3 .txt, "
        "2 without ending, 2 .xml, 2 of other endings, 3 FIFOs, sockets, devices or broken links"
    )
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(ValueError, match=r"holds no images \(.*\.png.*\); it holds 4 \.heic \(no reader"):
        ImageFolder(tmp_path)


def test_new_endings_are_found(tmp_path: Path) -> None:
    names = ["a.JFIF", "b.avif", "c.jp2", "d.tga", "e.mpo"]
    for name in names:
        save(tmp_path / name)
    folder = ImageFolder(tmp_path)
    assert folder.paths == [tmp_path / name for name in names]
    for number in range(len(names)):
        assert np.abs(np.asarray(folder[number], int) - (10, 20, 30)).max() < 4


def test_a_folder_that_cannot_be_opened_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "a.jpg")
    save(tmp_path / "shut" / "b.jpg")
    scandir = os.scandir

    def guarded(folder: str):
        if os.path.basename(os.path.normpath(folder)) == "shut":
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.warns(UserWarning, match=r"1 unopened folder \(.*shut/: Permission denied\)"):
        assert len(ImageFolder(tmp_path)) == 1
    with pytest.raises(ValueError, match="shut cannot be searched: Permission denied"):
        ImageFolder(tmp_path / "shut")


def test_an_empty_name_is_no_folder() -> None:
    with pytest.raises(ValueError, match="the name of the folder of images is empty"):
        ImageFolder("")


def test_names_cost_bytes_and_not_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 100_000
    names = (f"class {number % 100:03}/picture {number:06}.jpg" for number in range(count))
    monkeypatch.setattr("stellar_fast.data.folder.search", lambda root, endings, left_out: names)
    tracemalloc.start()
    folder = ImageFolder(tmp_path)
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert kept < 5e6  # 29 bytes and 8 for an offset each; Path objects took 220
    gc.collect()
    blocks = sys.getallocatedblocks()
    for number in range(0, count, 7):
        assert str(folder.paths[number]).endswith(f"{number:06}.jpg")
    assert folder.fingerprint
    gc.collect()
    assert sys.getallocatedblocks() - blocks < 1000  # of 14,286 names that were asked for


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


def test_worker_processes_share_what_was_told(tmp_path: Path) -> None:
    make_broken(tmp_path, good=18, bad=[3, 7])
    for number in (4, 19):  # of two workers, which do not meet them at the same moment
        Image.fromarray(np.full((9, 9), 900, np.uint16)).save(tmp_path / f"{number:03}.png")
    folder = ImageFolder(tmp_path)
    log = logging.FileHandler(tmp_path / "log")
    logging.getLogger("stellar_fast.data").addHandler(log)
    try:
        for _ in range(3):
            for _ in DataLoader(folder, batch_size=None, num_workers=2, multiprocessing_context="fork"):
                pass
    finally:
        logging.getLogger("stellar_fast.data").removeHandler(log)
        log.close()
    assert folder._unreadable.sum() == 2 and not folder.failed  # this process read nothing
    told = (tmp_path / "log").read_text()
    assert told.count("another image takes its place") == 2 and told.count("taken for 10 bits") == 1
    folder.max_failed_share = 0.05
    with pytest.raises(TooManyUnreadable, match=r"2 of 20 images .* the last one: \S+003\.png"):
        folder[3]


def test_a_folder_goes_to_another_process(tmp_path: Path) -> None:
    make_broken(tmp_path, good=18, bad=[3, 7])
    folder = ImageFolder(tmp_path, value_range=(0, 10))
    folder[3]
    copy = pickle.loads(pickle.dumps(folder))
    assert copy.paths == folder.paths and copy.fingerprint == folder.fingerprint
    assert copy._unreadable[3] and copy._unreadable.sum() == folder._unreadable.sum()
    copy._unreadable.put_up(0)
    assert not folder._unreadable[0]
    assert copy[5].getpixel((0, 0)) == folder[5].getpixel((0, 0)) == (128, 0, 0)


def test_all_unreadable_elsewhere_ends_here(tmp_path: Path) -> None:
    make_broken(tmp_path, good=0, bad=[0, 1, 2])
    folder = ImageFolder(tmp_path, max_failed_share=1.0)
    for number in range(3):
        folder._unreadable.put_up(number)  # as another worker does
    with pytest.raises(TooManyUnreadable, match="3 of 3"):
        folder[1]


def test_pictures_that_are_too_large_are_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        save(tmp_path / f"{number}.png", size=(8, 6) if number < 2 else (20, 30))
    folder = ImageFolder(tmp_path, max_failed_share=0.9, max_pixels=100)
    assert [folder[number].size for number in range(4)] == [(8, 6)] * 4
    (record,) = caplog.records
    assert "its 20 x 30 pixels are more than 100 pixels; --max-pixels N" in record.getMessage()
    assert len(folder.failed) == 2
    assert ImageFolder(tmp_path, max_pixels=600)[3].size == (20, 30)


def test_a_range_is_told_once_a_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(3):
        Image.fromarray(np.full((9, 9), 900 + number, np.uint16)).save(tmp_path / f"{number}.png")
    for _ in range(2):
        folder = ImageFolder(tmp_path)
        assert [folder[number].getpixel((0, 0))[0] for number in range(3)] == [224, 225, 225]
    assert len(caplog.records) == 2 and "0.png: its values end at 900, within an eighth of 16 bits" in caplog.text
    assert ImageFolder(tmp_path, value_range=(0, 1800))[0].getpixel((0, 0)) == (128,) * 3
