"""Weights: upstream's names both ways, files, the hub's layout, starts from a plain ViT."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from stellar_fast import StellarEncoder, StellarModel, VQGANConfig, from_pretrained, load_stellar
from stellar_fast.models.weights import upstream_names
from tests.conftest import SMALL_DECODER, SMALL_ENCODER, SMALL_KWARGS, mismatches, read_golden

TINY_VQGAN = VQGANConfig((1, 1, 1, 1, 1), 5, hidden_channels=32, num_res_blocks=1, z_channels=8)


def assert_same_weights(a, b):
    assert mismatches(a.upstream_state_dict(), b.upstream_state_dict(), absolute=0, relative=0) == []
    assert set(a.upstream_state_dict()) == set(b.upstream_state_dict())


def other(model: StellarModel) -> StellarModel:
    torch.manual_seed(99)
    return StellarModel.from_config(model.config)


def test_every_wrong_tensor_is_named_and_nothing_is_loaded(small_model):
    weights = small_model.upstream_state_dict()
    target = other(small_model)
    before = target.upstream_state_dict()
    broken = dict(weights)
    del broken["sparse_tokens"]
    broken["encoder.layernorm.weight"] = torch.zeros(7)
    broken["decoder.extra"] = torch.zeros(1)
    with pytest.raises(RuntimeError) as error:
        target.load_upstream_state_dict(broken)
    message = str(error.value)
    assert "missing tensors: sparse_tokens" in message
    assert "unexpected tensors: decoder.extra" in message
    assert "encoder.layernorm.weight is (7,) but the model needs (48,)" in message
    assert mismatches(target.upstream_state_dict(), before, absolute=0, relative=0) == []


def test_a_lenient_load_reports_what_it_left_out(small_model):
    weights = small_model.upstream_state_dict()
    target = other(small_model)
    del weights["sparse_tokens"]
    report = target.load_upstream_state_dict({**weights, "decoder.extra": torch.zeros(1)}, strict=False)
    assert report == (["sparse_tokens"], ["decoder.extra"])
    assert mismatches(target.upstream_state_dict(), weights, absolute=0, relative=0) == []


def test_training_checkpoint_with_its_prefix(small_model):
    target = other(small_model)
    checkpoint = {f"model.{name}": t for name, t in small_model.upstream_state_dict().items()}
    target.load_upstream_state_dict({"state_dict": checkpoint, "epoch": 3})
    assert_same_weights(target, small_model)


def test_an_encoder_takes_its_part_of_a_model(small_model):
    encoder = StellarEncoder(SMALL_ENCODER, 4)
    encoder.load_upstream_state_dict(small_model.upstream_state_dict())
    assert_same_weights(encoder, small_model.encoder)
    with pytest.raises(RuntimeError, match=re.escape("unexpected tensors: encoder.extra")):
        encoder.load_upstream_state_dict({**small_model.upstream_state_dict(), "encoder.extra": torch.zeros(1)})


def test_from_the_meta_device(small_model):
    with torch.device("meta"):
        model = StellarModel.from_config(small_model.config)
    with pytest.raises(ValueError, match=r"on the meta device: call model\.to_empty"):
        model.load_upstream_state_dict(small_model.upstream_state_dict())
    model.to_empty(device="cpu")
    model.load_upstream_state_dict(small_model.upstream_state_dict())
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(model.encode(images)["sparse"], small_model.encode(images)["sparse"])


def test_channels_last_models_save(small_model, tmp_path):
    small_model.to(memory_format=torch.channels_last).save_pretrained(tmp_path)
    assert_same_weights(StellarModel.from_pretrained(tmp_path), small_model)


def test_another_model_than_the_saved_one_is_refused(small_model, tmp_path):
    small_model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model 'stellar-b16' was asked for, but the saved one has other sizes"):
        StellarEncoder.from_pretrained(tmp_path, model="stellar-b16")


def test_gradients_are_those_of_the_trained_parameters(small_model, small_batch):
    total, _ = small_model.loss(small_model(small_batch)["predictions"])
    total.backward()
    names = {n for n in small_model.upstream_state_dict() if not re.search(r"pooler|decoder\.embeddings|gaussian", n)}
    gradients = small_model.upstream_gradients()
    assert set(gradients) == names
    qkv = small_model.encoder.transformer.blocks[0].attn.qkv.weight.grad
    parts = [gradients[f"encoder.encoder.layer.0.attention.attention.{x}.weight"] for x in ("query", "key", "value")]
    assert torch.equal(torch.cat(parts), qkv)


def test_unknown_names_are_refused():
    with pytest.raises(KeyError, match=r"no upstream name for tensor 'encoder\.rotary'"):
        upstream_names("encoder.rotary")


def test_save_and_load(small_model, tmp_path):
    small_model.save_pretrained(tmp_path)
    loaded = StellarModel.from_pretrained(tmp_path)
    assert_same_weights(loaded, small_model)
    assert loaded.config == small_model.config
    assert not loaded.training
    assert set(load_file(tmp_path / "model.safetensors")) == set(small_model.upstream_state_dict())
    assert_same_weights(from_pretrained(tmp_path / "model.safetensors"), small_model)
    assert_same_weights(StellarEncoder.from_pretrained(tmp_path), small_model.encoder)


def test_save_and_load_of_an_encoder(tmp_path):
    encoder = StellarEncoder(SMALL_ENCODER, 5, spatial_temp=None)
    encoder.save_pretrained(tmp_path)
    loaded = StellarEncoder.from_pretrained(tmp_path)
    assert_same_weights(loaded, encoder)
    assert loaded.spatial_temp is None
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")], "temporary files are left"


def test_a_part_can_be_left_out_on_loading(small_model, tmp_path):
    small_model.save_pretrained(tmp_path)
    encoder_only = StellarModel.from_pretrained(
        tmp_path, do_recon=False, do_clustering=False, do_cls=False, do_masking=False
    )
    assert encoder_only.decoder is None
    assert_same_weights(encoder_only.encoder, small_model.encoder)


@pytest.fixture
def upstream_repository(tmp_path):
    """A repository laid out as upstream's, of a model that is as wide as the real one and one layer deep."""
    from stellar_fast.models import hub

    model = StellarModel(
        hub.EncoderConfig(768, 12, 12, 3072, image_size=32, patch_size=16),
        num_decoder_layers=1,
        num_clusters=32,
        vq_model=TINY_VQGAN,
    )
    save_file(model.upstream_state_dict(), tmp_path / "stellar-b16.safetensors")
    entry = {
        "num_sparse_tokens": 16,
        "num_decoder_layers": 1,
        "spatial_temp": 0.06,
        "do_cls": True,
        "num_clusters": 32,
        "embed_dim": 768,
        "patch_size": 16,
        "image_size": 32,
        "recon_type": "vq",
        "weights": "stellar-b16.safetensors",
    }
    (tmp_path / "config.json").write_text(json.dumps({"models": {"stellar-b16": entry}}))
    return tmp_path, model


def test_load_stellar_understands_upstreams_manifest(upstream_repository):
    path, model = upstream_repository
    encode = load_stellar("stellar-b16", repo_id=str(path))
    assert_same_weights(encode.encoder, model.encoder)
    images = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(encode.encode(images)["sparse"], model.encode(images)["sparse"])
    reconstruct = load_stellar("stellar-b16", "reconstruct", vq_model=model.tokenizer, repo_id=str(path))
    assert torch.equal(
        reconstruct.reconstruct(reconstruct.encode(images))["reconstruction"],
        model.reconstruct(model.encode(images))["reconstruction"],
    )
    assert_same_weights(load_stellar("stellar-b16", "pretrain", vq_model=model.tokenizer, repo_id=str(path)), model)
    with pytest.raises(ValueError, match=r"unknown model 'stellar-g16': the manifest has stellar-b16"):
        load_stellar("stellar-g16", repo_id=str(path))
    with pytest.raises(ValueError, match="purpose must be one of encode, reconstruct, pretrain but is 'decode'"):
        load_stellar(purpose="decode", repo_id=str(path))
    with pytest.raises(ValueError, match="purpose 'pretrain' needs vq_model"):
        load_stellar(purpose="pretrain", repo_id=str(path))


def test_load_stellar_names_missing_and_unexpected_tensors(upstream_repository):
    path, _ = upstream_repository
    weights = load_file(path / "stellar-b16.safetensors")
    weights["encoder.extra"] = weights.pop("sparse_tokens")
    save_file(weights, path / "stellar-b16.safetensors")
    with pytest.raises(RuntimeError, match=r"missing tensors: sparse_tokens; unexpected tensors: encoder\.extra"):
        load_stellar("stellar-b16", repo_id=str(path))


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("nowhere/at/all", FileNotFoundError, "nowhere/at/all is neither a file"),
        ("weights.safetensors", FileNotFoundError, r"weights\.safetensors is neither a file"),
        ("./no/dir", FileNotFoundError, "is neither a file"),
    ],
)
def test_wrong_paths_are_named(path, error, message):
    with pytest.raises(error, match=message):
        StellarModel.from_pretrained(path)


def test_wrong_files_are_named(small_model, tmp_path):
    small_model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"cannot read weights from {weights}"):
        StellarModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        StellarModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="name the model= they are of"):
        StellarModel.from_pretrained(tmp_path)


class Danger:
    def __reduce__(self):
        return (print, ("this ran",))


def test_pickles_that_run_code_are_refused(tmp_path, capsys):
    torch.save({"sparse_tokens": Danger()}, tmp_path / "weights.ckpt")
    with pytest.raises(ValueError, match="cannot read weights from"):
        StellarEncoder.from_pretrained(tmp_path / "weights.ckpt", model="tiny")
    assert "this ran" not in capsys.readouterr().out


def vit_tensors(encoder: StellarEncoder) -> dict[str, torch.Tensor]:
    """The trunk of an encoder under Hugging Face's names."""
    return {
        name.removeprefix("encoder."): t + 1
        for name, t in encoder.upstream_state_dict().items()
        if name.startswith("encoder.")
    }


@pytest.mark.parametrize("prefix", ["", "vit."])
def test_start_from_a_hugging_face_vit(tmp_path, prefix):
    encoder = StellarEncoder(SMALL_ENCODER, 4)
    trunk = vit_tensors(encoder)
    extra = {"decoder.decoder_norm.weight": torch.zeros(3), "classifier.weight": torch.zeros(3)}
    save_file({**{prefix + name: t for name, t in trunk.items()}, **extra}, tmp_path / "model.safetensors")
    model = StellarModel(SMALL_ENCODER, SMALL_DECODER, vit_pretrained=tmp_path, **SMALL_KWARGS)
    assert mismatches(vit_tensors(model.encoder), {n: t + 1 for n, t in trunk.items()}, absolute=0) == []


def test_start_from_a_timm_vit(tmp_path):
    torch.manual_seed(3)
    source = StellarEncoder(SMALL_ENCODER, 4)
    names = {
        re.sub(r"^transformer\.", "", re.sub(r"^patch_embed\.", "patch_embed.proj.", name)): t.clone()
        for name, t in source.state_dict().items()
        if not re.match(r"pooler|sparse|dense", name)
    }
    torch.save({**names, "head.weight": torch.zeros(2)}, tmp_path / "vit.bin")
    model = StellarModel(SMALL_ENCODER, SMALL_DECODER, vit_pretrained=tmp_path / "vit.bin", **SMALL_KWARGS)
    trunk = {n: t for n, t in source.state_dict().items() if not re.match(r"pooler|sparse|dense", n)}
    assert mismatches(model.encoder.state_dict(), trunk, absolute=0, relative=0) == []
    del names["blocks.1.attn.qkv.weight"]
    torch.save(names, tmp_path / "vit.bin")
    with pytest.raises(RuntimeError, match=r"missing tensors: blocks\.1\.attn\.qkv\.weight"):
        StellarModel(SMALL_ENCODER, SMALL_DECODER, vit_pretrained=tmp_path / "vit.bin", **SMALL_KWARGS)


def test_a_start_from_another_trunk_is_refused(tmp_path):
    trunk = vit_tensors(StellarEncoder(SMALL_ENCODER, 4))
    trunk["encoder.layer.2.output.dense.bias"] = torch.zeros(48)
    save_file(trunk, tmp_path / "vit.safetensors")
    with pytest.raises(RuntimeError, match=r"unexpected tensors: encoder\.layer\.2\.output\.dense\.bias"):
        StellarModel(SMALL_ENCODER, SMALL_DECODER, vit_pretrained=tmp_path / "vit.safetensors", **SMALL_KWARGS)
    with pytest.raises(FileNotFoundError, match=r"weights/none\.safetensors is neither a file"):
        StellarModel(SMALL_ENCODER, SMALL_DECODER, vit_pretrained="weights/none.safetensors", **SMALL_KWARGS)


def test_start_resizes_the_position_embedding(tmp_path):
    trunk = vit_tensors(StellarEncoder(SMALL_ENCODER, 4))
    trunk["embeddings.position_embeddings"] = torch.full((1, 1 + 64, 48), 0.5)
    save_file(trunk, tmp_path / "vit.safetensors")
    model = StellarModel(SMALL_ENCODER, SMALL_DECODER, vit_pretrained=tmp_path / "vit.safetensors", **SMALL_KWARGS)
    torch.testing.assert_close(model.encoder.pos_embed.data, torch.full((1, 17, 48), 0.5))


def test_tokenizer_tensors_fill_the_vqgan():
    case = read_golden("vq")
    model = case.model()
    expected = {n.removeprefix("tokenizer."): t for n, t in case.part("weights").items() if n.startswith("tokenizer.")}
    assert set(expected) == set(model.tokenizer.state_dict())
    assert mismatches(model.tokenizer.state_dict(), expected, absolute=0, relative=0) == []
