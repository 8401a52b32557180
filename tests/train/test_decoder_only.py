"""A fresh decoder on a frozen encoder."""

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from stellar_fast import VQGAN, StellarEncoder, StellarModel, VQGANConfig
from stellar_fast.train import TrainConfig, train
from stellar_fast.train.build import build_dataset, build_model
from stellar_fast.train.distributed import Ranks
from stellar_fast.train.loop import _Trainer
from tests.train.test_loop import SignalAt, change, numbers


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, photos: Path, tiny: dict[str, Any]) -> TrainConfig:
    """A run of two steps, whose encoder is the one to look into."""
    config = TrainConfig(data=str(photos), out=str(tmp_path_factory.mktemp("start") / "run"), **tiny | {"steps": 2})
    train(config)
    return config


@pytest.fixture
def config(start: TrainConfig, tmp_path: Path, tiny: dict[str, Any]) -> TrainConfig:
    kept = {name: value for name, value in tiny.items() if name not in ("encoder", "model")}
    return TrainConfig(data=start.data, out=str(tmp_path / "decoder"), weights=start.out, decoder_only=True, **kept)


def encoder_of(config: TrainConfig) -> StellarEncoder:
    (checkpoint,) = (Path(config.out) / "checkpoints").iterdir()
    return StellarEncoder.from_pretrained(checkpoint)


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_decoder_learns_and_the_encoder_stays(config: TrainConfig, start: TrainConfig) -> None:
    config = change(config, steps=40, lr=3e-3)
    result = train(config)
    records = numbers(config)
    assert records[-1]["MSE"] < 0.7 * records[0]["MSE"]
    assert {name for name in records[0] if "loss" in name or name == "MSE"} == {"loss", "MSE"}
    assert same(result.model.encoder, encoder_of(start))
    torch.manual_seed(config.seed)
    assert not same(result.model.decoder, build_model(config).decoder)
    saved = StellarModel.from_pretrained(result.checkpoint)
    assert same(saved.encoder, result.model.encoder) and same(saved.decoder, result.model.decoder)
    images = torch.rand(2, 3, 32, 40)
    whole = result.model.eval()
    torch.testing.assert_close(
        saved.reconstruct(saved.encode(images))["reconstruction"],
        whole.reconstruct(whole.encode(images))["reconstruction"],
    )


def test_a_step_pays_for_one_view_and_no_gradient_of_the_encoder(config: TrainConfig) -> None:
    model = build_model(config)
    dataset = build_dataset(config, model)
    views = dataset[(0, 0)]
    assert views["global_views"].shape == (1, 3, 32, 32) and len(views["local_views"]) == 0
    trainer = _Trainer(config, model, dataset, torch.device("cpu"), Ranks())
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.decoder.parameters()}

    def look(_: torch.nn.Module, arguments: tuple, outputs: list) -> None:
        ((view,),) = arguments
        assert view.images.shape == (4, 3, 32, 32) and view.keep_indices is None
        assert not torch.is_grad_enabled()
        seen.append(outputs[0].query.requires_grad)

    seen: list[bool] = []
    hook = model.encoder.register_forward_hook(look)
    batches = trainer._batches()
    trainer._train_step(batches)
    batches.close()
    hook.remove()
    assert seen == [False]


@pytest.mark.parametrize("changes", [{}, {"precision": "bf16", "accumulate": 2, "workers": 2}], ids=["plain", "bf16"])
def test_an_interrupted_run_continues_bit_for_bit_without_its_weights(
    config: TrainConfig, start: TrainConfig, tmp_path: Path, changes: dict
) -> None:
    config = change(config, **changes)
    whole = train(config)
    weights = shutil.copytree(start.out, tmp_path / "weights")
    other = change(config, out=str(tmp_path / "other"), weights=str(weights))
    first = train(other, loggers=[SignalAt(2, signal.SIGINT)])
    assert first.step == 3
    assert first.resume_command == f"stellar-fast train-decoder --config {other.out}/config.yaml --resume"
    shutil.rmtree(weights)
    second = train(TrainConfig.load(f"{other.out}/config.yaml"), resume=True)
    assert second.step == 7 and numbers(other) == numbers(config)
    assert same(second.model, whole.model)


def test_the_decoder_is_the_published_one_unless_told_otherwise(config: TrainConfig) -> None:
    sizes = build_model(TrainConfig(weights=config.weights, decoder_only=True)).decoder.config
    assert (sizes.num_hidden_layers, sizes.hidden_size, sizes.num_attention_heads) == (6, 512, 8)
    model = build_model(change(config, model={"num_decoder_layers": 2}))
    assert len(model.decoder.transformer.blocks) == 2 and model.decoder.config.hidden_size == 32


def test_every_kind_of_weights_gives_the_same_encoder(config: TrainConfig, start: TrainConfig, tmp_path: Path) -> None:
    expected = encoder_of(start)
    expected.save_pretrained(tmp_path / "encoder")
    (checkpoint,) = (Path(start.out) / "checkpoints").iterdir()
    for weights in (checkpoint, checkpoint / "model.safetensors", tmp_path / "encoder"):
        assert same(build_model(change(config, weights=str(weights))).encoder, expected)
    again = change(config, weights=str(tmp_path / "encoder"), steps=1)
    train(again)
    third = change(config, weights=again.out)  # a decoder's run is weights like any other
    assert same(build_model(third).encoder, expected)


def test_a_head_over_codes_learns(config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    sizes = VQGANConfig((1, 1, 1, 2), 4, hidden_channels=32, num_res_blocks=1, z_channels=8, num_embeddings=16)
    vqgan = VQGAN(sizes)
    before = {name: tensor.clone() for name, tensor in vqgan.state_dict().items()}
    monkeypatch.setattr(VQGAN, "from_pretrained", classmethod(lambda cls, path: vqgan))
    config = change(config, model={"vq_model": str(tmp_path / "vqgan.bin")}, steps=40, lr=1e-2)
    result = train(config)
    records = numbers(config)
    assert records[-1]["VQ-CE"] < 0.8 * records[0]["VQ-CE"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in vqgan.state_dict().items())
    with pytest.raises(ValueError, match="this model reconstructs VQ codes: pass vq_model="):
        StellarModel.from_pretrained(result.checkpoint)
    saved = StellarModel.from_pretrained(result.checkpoint, vq_model=vqgan)
    assert saved.reconstruct(saved.encode(torch.rand(1, 3, 32, 32)))["reconstruction"].shape == (1, 3, 32, 32)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"weights": ""}, ValueError, r"weights is empty: name those of the encoder"),
        ({"weights": "/no/where"}, FileNotFoundError, "/no/where is neither a file, nor a directory"),
        ({"encoder": {"patch_size": 16}}, ValueError, r"the encoder is that of .*: \{'patch_size': 16\}"),
        ({"model": {"num_masks": 2}}, ValueError, "unknown model option 'num_masks'"),
        ({"model": {"vq_model": "/no/vqgan.bin"}}, FileNotFoundError, "no weights file at /no/vqgan.bin"),
        ({"decoder": {"width": 2}}, ValueError, "unknown decoder option 'width'"),
        ({"preset": "b16"}, ValueError, "model 'b16' was asked for, but the saved one has other sizes"),
        ({"preset": "b17"}, ValueError, "unknown preset 'b17'"),
    ],
)
def test_a_decoder_that_cannot_be_built_says_why(
    config: TrainConfig, changes: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        train(change(config, **changes))


def test_a_run_is_either_of_a_whole_model_or_of_a_decoder(config: TrainConfig) -> None:
    train(config)
    with pytest.raises(ValueError, match="made with decoder_only True, this run has False"):
        train(change(config, decoder_only=False, weights=""), resume=True)
