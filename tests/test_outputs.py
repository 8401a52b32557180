"""Where the commands write: every image has a picture of its own, nobody's file is replaced, features are kept once."""

import json
import os
from pathlib import Path, PurePosixPath

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from stellar_fast.commands.outputs import FEATURES, RECORD, Features, check_names, picture_name, pictures
from stellar_fast.files import MARK, PICTURE, is_ours
from stellar_fast.visualize import save_image

PART = st.lists(
    st.sampled_from(["x", ".", "~", "_", ".png", ".jpg", ".json", "metrics.json", "é" * 60, "y" * 120]),
    min_size=1,
    max_size=4,
).map("".join)
FOLDER = PART.filter(lambda part: part not in (".", "..") and len(part.encode()) < 255)
NAME = st.builds(lambda folders, file: "/".join((*folders, file)), st.lists(FOLDER, max_size=3), FOLDER)


def is_tree(names: set[str]) -> bool:
    """Whether these can be files at the same time: none of them is the folder of another."""
    return not any(str(parent) in names for name in names for parent in PurePosixPath(name).parents)


@settings(deadline=None)
@given(st.sets(NAME, max_size=12).filter(is_tree))
@example({"a.jpg", "a.png", "a.jpg.png", "a.jpg.png.png"})
@example({"x.jpg", "x.jpg.png/y.jpg", "x.jpg.png_/y.jpg", "x.jpg.png__/y.jpg"})
@example({"metrics.json/z.jpg", "metrics.json_/z.jpg", "metrics.jpg"})
@example({"y" * 255, "y" * 127 + "/" + "y" * 128, "y" * 127 + "~/" + "y" * 128, "y" * 127 + "~_/" + "y" * 128})
def test_every_image_has_a_picture_of_its_own(names: set[str]) -> None:
    targets = {picture_name(name) for name in names}
    assert len(targets) == len(names)
    assert is_tree({*targets, RECORD}) and RECORD not in targets
    assert all(len(os.fsencode(part)) <= 255 for target in targets for part in target.split("/"))


@pytest.mark.parametrize(
    ("name", "picture"),
    [
        ("photo.jpg", "photo.jpg.png"),
        ("a/b.c/photo.png", "a/b.c/photo.png.png"),
        ("x.png/y.jpg", "x.png_/y.jpg.png"),
        ("metrics.json_/y~/z.tif", "metrics.json__/y~_/z.tif.png"),
        (os.fsdecode(b"caf\xe9.png"), os.fsdecode(b"caf\xe9.png.png")),
        ("a/" + "l" * 251 + ".jpg", "a/" + "l" * 127 + "~/" + "l" * 124 + ".jpg.png"),
        ("é" * 125 + ".jpg", "é" * 63 + "~/" + "é" * 62 + ".jpg.png"),
    ],
)
def test_a_picture_is_named_like_its_image(name: str, picture: str) -> None:
    assert picture_name(name) == picture


class TestPictures:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        """photos/a.jpg, photos/in/b.jpg, a linked folder with c.jpg, a linked file."""
        for name in ("photos/a.jpg", "photos/in/b.jpg", "far/c.jpg", "else/d.jpg"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(f"photo {MARK}")
        (tmp_path / "photos" / "more").symlink_to("../far")
        (tmp_path / "photos" / "d.jpg").symlink_to("../else/d.jpg")
        return tmp_path

    def ask(self, root: Path, out: Path | str, images: str = "photos", overwrite: bool = False) -> dict[str, Path]:
        names = ["a.jpg", "in/b.jpg", "more/c.jpg", "d.jpg"] if images == "photos" else [Path(images).name]
        paths = [root / "photos" / name for name in names]
        return pictures(paths, names, str(root / images), str(out), PICTURE, overwrite)

    def test_they_are_told_by_the_names_of_the_images(self, root: Path) -> None:
        out = root / "else" / "new"
        found = self.ask(root, out)
        assert found["in/b.jpg"] == out / "in" / "b.jpg.png" and len(found) == 4 and not out.exists()

    @pytest.mark.parametrize("out", ["photos", "photos/in", "photos/new", "far", "far/new", "else", "link", "through"])
    def test_they_do_not_mix_with_the_images(self, root: Path, out: str) -> None:
        (root / "link").symlink_to("photos/in")
        (root / "through").mkdir()
        (root / "through" / "more").symlink_to("../far")
        with pytest.raises(ValueError, match=r"lies in the folder of the images, .*: its pictures would mix with them"):
            self.ask(root, root / out, overwrite=True)

    def test_those_of_one_image_may_lie_below_it(self, root: Path) -> None:
        assert self.ask(root, root / "photos" / "new", "photos/a.jpg") == {
            "a.jpg": root / "photos" / "new" / "a.jpg.png"
        }
        with pytest.raises(ValueError, match="would mix with them"):
            self.ask(root, root / "photos", "photos/a.jpg")

    def test_a_folder_above_the_images_is_one_unless_a_picture_falls_among_them(self, root: Path) -> None:
        assert len(self.ask(root, root)) == 4
        (root / "in").symlink_to("photos/in")
        with pytest.raises(ValueError, match="would mix with them"):
            self.ask(root, root)

    def test_they_replace_pictures_alone(self, root: Path) -> None:
        out = root / "out"
        save_image(out / "a.jpg.png", Image.new("RGB", (4, 4)))
        assert self.ask(root, out)["a.jpg"] == out / "a.jpg.png"
        (out / "in").mkdir()
        (out / "in" / "b.jpg.png").write_text(f"a text {MARK}")
        with pytest.raises(ValueError, match=r"b\.jpg\.png exists and was not written by stellar_fast as a picture: "):
            self.ask(root, out)
        self.ask(root, out, overwrite=True)
        save_image(out / "in" / "b.jpg.png", Image.new("RGB", (4, 4)), kind="a reconstruction", overwrite=True)
        with pytest.raises(ValueError, match=r"b\.jpg\.png exists and was not written by stellar_fast as a picture: "):
            self.ask(root, out)
        os.link(root / "photos" / "a.jpg", out / "d.jpg.png")
        with pytest.raises(ValueError, match=r"d\.jpg\.png is .*a\.jpg, which is read"):
            self.ask(root, out, overwrite=True)

    def test_two_of_them_may_not_be_one_file(self, root: Path) -> None:
        out = root / "out"
        save_image(out / "a.jpg.png", Image.new("RGB", (4, 4)))
        (out / "d.jpg.png").symlink_to("a.jpg.png")
        with pytest.raises(ValueError, match=r"d\.jpg\.png \(a link to .*a\.jpg\.png\) is a file that is written"):
            self.ask(root, out)


class TestFeatures:
    def batch(self, count: int, first: float) -> dict[str, torch.Tensor]:
        """Views of a far larger storage, as an encoder may return them; `dense` is not kept."""
        whole = torch.arange(count * 700.0).reshape(count, 7, 100) + first
        return {"cls": whole[:, :1, :4], "sparse": whole[:, 1:3, :4], "spatial": whole[:, 3:, :2], "dense": whole}

    def test_the_file_is_that_of_safetensors(self, tmp_path: Path) -> None:
        features, path = Features(9, tmp_path), tmp_path / "new" / "f.safetensors"
        batches = [self.batch(count, first) for count, first in ((3, 0.0), (1, 0.5), (2, -1e6))]
        names = [f"{i}\n{os.fsdecode(bytes([0xE9]))}.jpg" for i in range(6)]
        for batch in batches:
            some, names_left = names[: len(batch["cls"])], names[len(batch["cls"]) :]
            features.add(some, batch)
            names = names_left
        features.write(path, {"weights": "w"})
        found = load_file(path)
        assert set(found) == {"sparse", "spatial", "cls"}
        for name, tensor in found.items():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, torch.cat([batch[name] for batch in batches])), name
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        assert (metadata["about"], metadata["weights"]) == (f"features {MARK}", "w")
        held = json.loads(metadata["names"])
        assert [os.fsencode(name) for name in held] == [b"%d\n\xe9.jpg" % i for i in range(6)]

    def test_the_mark_stands_before_megabytes_of_names(self, tmp_path: Path) -> None:
        features = Features(2, tmp_path)
        features.add(["x" * 2_000_000, "y"], self.batch(2, 0.0))
        for path in (tmp_path / "f.st", tmp_path / "g.st"):
            features.write(path, {"weights": "w"})
            assert is_ours(path, FEATURES) and not is_ours(path, "a picture")
        with safe_open(path, "pt") as file:
            assert len(file.metadata()["names"]) > 2_000_000

    def test_they_are_kept_once(self, tmp_path: Path) -> None:
        features = Features(40, tmp_path)
        for _ in range(10):
            batch = self.batch(4, 0.0)
            storages = {tensor.untyped_storage().data_ptr() for tensor in batch.values()}
            features.add(["name"] * 4, batch)
            assert not storages & {tensor.untyped_storage().data_ptr() for tensor in features.tensors.values()}
        held = sum(tensor.untyped_storage().nbytes() for tensor in features.tensors.values())
        assert held == 40 * (1 * 4 + 2 * 4 + 4 * 2) * 4
        features.write(tmp_path / "f.st", {})
        assert held < (tmp_path / "f.st").stat().st_size < held + 1000

    def test_a_disk_too_full_is_told_with_the_first_batch(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        usage = type("usage", (), {"free": 2**20})
        monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
        with pytest.raises(
            ValueError, match=r"of 100,000 images need 7\.6 MiB, and .* has 1\.0 MiB free: another --out"
        ):
            Features(100_000, tmp_path / "new").add(["a"], self.batch(1, 0.0))

    def test_more_names_than_a_file_holds_are_refused_before_the_work(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("stellar_fast.commands.outputs._LONGEST_HEADER", 2_000_000)
        check_names(["x" * 94] * 19_000)  # and six characters each of JSON in JSON
        with pytest.raises(ValueError, match=r"names of the images are 2 MB, .* with --limit and --skip"):
            check_names(["x" * 94] * 20_000)
