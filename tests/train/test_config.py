import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stellar_fast import StellarModel
from stellar_fast.train.build import build_dataset
from stellar_fast.train.config import TrainConfig, resolve_device


def test_flags_win_over_the_file_and_tables_merge(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("lr: 1e-4\nbatch_size: 8\nmodel: {num_masks: 2, masking_ratio: 0.8}\n")
    config = TrainConfig.load(file, batch_size=16, model={"num_masks": 4})
    assert config.lr == 1e-4  # YAML itself reads 1e-4 as text
    assert config.batch_size == 16
    assert config.model == {"num_masks": 4, "masking_ratio": 0.8}
    assert config.clip == 3.0


def test_defaults_give_way_to_the_file_and_to_flags(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("lr: 1e-4\n")
    config = TrainConfig.load(file, defaults={"lr": 1.0, "epochs": 20, "batch_size": 4}, batch_size=8)
    assert (config.lr, config.epochs, config.batch_size) == (1e-4, 20, 8)


def test_the_model_is_tiny_unless_weights_tell_another() -> None:
    assert TrainConfig().preset == "tiny"
    assert TrainConfig(decoder_only=True).preset == ""


def test_saved_config_loads_to_the_same_run_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = TrainConfig(data="photos", out="run", lr=3e-4, model={"focal_mode": None}, value_range=(0, 4095))
    config.save(tmp_path / "config.yaml")
    monkeypatch.chdir("/")
    loaded = TrainConfig.load(tmp_path / "config.yaml")
    assert loaded == dataclasses.replace(config, data=str(tmp_path / "photos"), out=str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batchsize": 4}, r"unknown training option 'batchsize'; did you mean batch_size"),
        ({"lr": "fast"}, r"lr must be a number, got 'fast'"),
        ({"steps": 1.5}, r"steps must be a whole number, got 1.5"),
        ({"compile": "yes"}, r"compile must be true or false, got 'yes'"),
        ({"model": [1]}, r"model must be a table, got \[1\]"),
        ({"batch_size": 0}, r"batch_size must be at least 1, got 0"),
        ({"precision": "fp8"}, r"precision must be auto, fp32 or bf16, got 'fp8'"),
        ({"warmup": 1}, r"warmup must be in \[0, 1\), got 1.0"),
        ({"value_range": 255}, r"value_range must be two numbers, got 255"),
        ({"value_range": [0, "x"]}, r"value_range must be a number, got 'x'"),
        ({"max_pixels": -1}, r"max_pixels must be zero or more, got -1"),
    ],
)
def test_wrong_values_are_named(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig.load(**values)


def test_a_file_that_is_no_table_is_named(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("- 1\n")
    with pytest.raises(ValueError, match=r"run\.yaml holds a list"):
        TrainConfig.load(file)
    file.write_text("a: [1\n")
    with pytest.raises(ValueError, match=r"run\.yaml is not YAML"):
        TrainConfig.load(file)


def test_devices() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="got 'gpu'"):
        resolve_device("gpu")
    with pytest.raises(ValueError, match="device cuda:99 is not there"):
        resolve_device("cuda:99")


def test_the_range_of_the_images_reaches_their_reader(tmp_path: Path) -> None:
    Image.fromarray(np.full((40, 40), 1000, np.uint16)).save(tmp_path / "dark.png")
    config = TrainConfig.load(data=str(tmp_path), value_range=[0, 2000])
    (image,) = build_dataset(config, StellarModel("tiny")).folder
    assert np.unique(image).tolist() == [128]
    with pytest.raises(ValueError, match=r"more than 1,599 pixels"):
        build_dataset(TrainConfig(data=str(tmp_path), max_pixels=1599), StellarModel("tiny")).folder[0]
