"""The demo, shortened to seconds: it learns, draws, and touches nothing that is not its own."""

import pytest
from PIL import Image

from stellar_fast import StellarModel
from stellar_fast.demo import bundled_photos, demo, mean_colour_psnr


def test_demo_learns_and_leaves_pictures_and_weights(tmp_path, capsys):
    out = tmp_path / "demo_out"
    demo(out, seconds=1)
    result = demo(out, seconds=4)  # an earlier demo's folder is replaced
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


def test_demo_refuses_a_folder_that_is_not_its_own(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "mine.jpg").write_text("mine")
    with pytest.raises(ValueError, match="holds files that no demo wrote"):
        demo(tmp_path, seconds=1)
    assert (tmp_path / "photos" / "mine.jpg").read_text() == "mine"
    with pytest.raises(ValueError, match="seconds must be at least 1 but is 0"):
        demo(tmp_path / "new", seconds=0)


def test_held_out_photos_are_not_trained_on_and_have_contrast():
    trained, held_out = bundled_photos()
    assert not set(trained) & set(held_out)
    assert all(10 < value < 20 for value in mean_colour_psnr(held_out, 96))
