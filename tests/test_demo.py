"""The demo, of a few steps: it learns, draws, and touches nothing that is not its own."""

import importlib
import signal

import pytest
from PIL import Image
from typer.testing import CliRunner

from stellar_fast import StellarModel
from stellar_fast.cli import app
from stellar_fast.demo import MARKER, Result, bundled_photos, demo, mean_colour_psnr
from stellar_fast.files import MARK, TEMPORARY, lock_folder
from stellar_fast.train import train

module = importlib.import_module("stellar_fast.demo")


class _Terminate:
    """A logger that ends the training with its first step."""

    def log(self, record):
        signal.raise_signal(signal.SIGTERM)

    def close(self):
        pass


def test_demo_learns_and_leaves_pictures_and_weights(tmp_path, capsys, monkeypatch):
    out = tmp_path / "demo_out"
    with monkeypatch.context() as patch:
        patch.setattr(module, "train", lambda *args, **kwargs: train(*args, **{**kwargs, "loggers": [_Terminate()]}))
        assert demo(out, seconds=600).signal == signal.SIGTERM
    assert (out / "reconstructions.png").is_file()
    monkeypatch.setattr(module, "STEPS", 6)
    result = demo(out, seconds=600)  # an earlier demo's folder is replaced
    assert result.signal is None
    shown = capsys.readouterr().out
    assert "held-out photos" in shown and "token entropy" in shown and "images/s" in shown
    _, held_out = bundled_photos()
    for name in held_out:
        with Image.open(out / "tokens" / f"{name}.png") as picture:
            assert min(picture.size) > 500
    for name in ("loss_curve.png", "reconstructions.png"):
        with Image.open(out / name) as picture:
            assert len(picture.convert("L").getcolors(256)) > 50, f"{name} shows nothing"
    assert set(result.losses) == {
        *("total", "MSE", "koleo_loss", "clustering_loss", "cls_clustering_loss", "mask_loss", "cls_loss")
    }
    assert result.losses["MSE"] < 0.2, "random weights start at 0.25"
    model = StellarModel.from_pretrained(out / "weights")
    assert model.encoder.num_sparse_tokens == 16
    assert len(result.psnr) == len(result.tokens_winning) == len(held_out)


@pytest.mark.parametrize(
    ("marker", "name"),
    [
        ("", "photos/mine.jpg"),
        ("somebody's", "loss_curve.png"),
        (MARK, "notes.txt"),
        (MARK, "tokens/notes.txt"),
        (MARK, "photos/rocket/00.jpg/mine.jpg"),
        (MARK, "run/features.safetensors"),
        (MARK, "weights/old/model.safetensors"),
        (MARK, "loss_curve.png\n"),
    ],
)
def test_demo_refuses_a_folder_that_holds_more_than_its_own(tmp_path, marker, name):
    for own in (MARKER, "reconstructions.png", f"run/checkpoints/{TEMPORARY}x", name) if marker else (name,):
        path = tmp_path / own
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(marker if own == MARKER else "mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"holds .*, which no demo wrote: name another --out"):
        demo(tmp_path, seconds=1)
    assert sorted(tmp_path.rglob("*")) == before and path.read_text() == "mine"


@pytest.mark.parametrize("name", ["photos/rocket", "photos/rocket/00.jpg", "loss_curve.png"])
def test_demo_takes_no_link_for_its_own(tmp_path, name):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "00.jpg").write_text("mine")
    link = tmp_path / "out" / name
    link.parent.mkdir(parents=True)
    (tmp_path / "out" / MARKER).write_text(MARK)
    link.symlink_to(tmp_path / "mine" if name == "photos/rocket" else tmp_path / "mine" / "00.jpg")
    with pytest.raises(ValueError, match=rf"holds .*{link.name}, which no demo wrote"):
        demo(tmp_path / "out", seconds=1)
    assert link.is_symlink() and (tmp_path / "mine" / "00.jpg").read_text() == "mine"


def test_demo_says_where_it_cannot_run(tmp_path):
    with pytest.raises(ValueError, match="seconds must be at least 1 but is 0"):
        demo(tmp_path / "new", seconds=0)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"file cannot be a folder: .*file is a file"):
        demo(tmp_path / "file", seconds=1)
    with lock_folder(tmp_path), pytest.raises(ValueError, match="is in use by another process"):
        demo(tmp_path, seconds=1)
    result = CliRunner().invoke(app, ["demo", "--out", ""])
    assert (result.exit_code, result.stderr) == (2, "error: out is empty: name a folder\n")


def test_the_command_ends_as_the_signal_says(monkeypatch):
    result = Result([], {}, 0.0, [], 0, 0.0, signal=15)
    monkeypatch.setattr(module, "demo", lambda **_: result)
    assert CliRunner().invoke(app, ["demo"]).exit_code == 143


def test_held_out_photos_are_not_trained_on_and_have_contrast():
    trained, held_out = bundled_photos()
    assert not set(trained) & set(held_out)
    assert all(10 < value < 20 for value in mean_colour_psnr(held_out, 96))
