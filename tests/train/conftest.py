"""A model of 32-pixel images that trains in milliseconds, and a folder of pictures for it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stellar_fast.train import TrainConfig

TINY: dict[str, Any] = {
    "device": "cpu",
    "batch_size": 4,
    "steps": 7,
    "workers": 0,
    "log_every": 1,
    "save_every": 0,
    "lr": 1e-3,
    "encoder": {
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "image_size": 32,
        "patch_size": 8,
    },
    "decoder": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64},
    "model": {
        "num_sparse_tokens": 4,
        "num_clusters": 32,
        "predictor_hidden_dim": 32,
        "prototype_dim": 16,
        "num_masks": 2,
        "num_local_crops": 2,
        "masking_ratio": 0.5,
    },
}


@pytest.fixture(scope="session")
def tiny() -> dict[str, Any]:
    return TINY


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten smooth colour pictures, so that with batches of 4 an epoch is two batches."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(10):
        pixels = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((60, 48), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def config(photos: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(data=str(photos), out=str(tmp_path / "run"), **TINY)
