"""Weights: upstream's names both ways, files, the hub's layout, starts from a plain ViT."""

import json
import re

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from stellar_fast import StellarEncoder, StellarModel, VQGANConfig, from_pretrained, load_stellar
from stellar_fast.models.weights import upstream_names
from stellar_fast.train.checkpoint import save_checkpoint
from tests.conftest import SMALL_DECODER, SMALL_ENCODER, SMALL_KWARGS, mismatches, read_golden
from tests.roundings import assert_alike

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


@pytest.mark.parametrize(
    "wrap",
    [
        "module.{}",
        "_orig_mod.{}",
        "model.{}",
        "module._orig_mod.{}",
        "_orig_mod.module.{}",
        "model._orig_mod.module.{}",
        "_fsdp_wrapped_module.model.{}",
        "net.student.{}",
        "model.module.model.{}",
    ],
)
@pytest.mark.parametrize("part", ["model", "encoder"])
def test_names_before_which_wrappers_put_theirs(small_model, wrap, part):
    target = other(small_model) if part == "model" else StellarEncoder(SMALL_ENCODER, 4)
    source = small_model if part == "model" else small_model.encoder
    target.load_upstream_state_dict({wrap.format(name): t for name, t in small_model.upstream_state_dict().items()})
    assert_same_weights(target, source)


def test_names_into_which_wrappers_put_theirs(small_model):
    """torch.compile, FSDP and checkpointing of parts, and a DataParallel of one more."""
    names = {
        r"^(encoder\.encoder\.layer\.\d)": r"\1._checkpoint_wrapped_module",
        r"^(clustering_head)": r"\1._orig_mod",
        r"^(decoder)(?=\.)": r"\1._fsdp_wrapped_module.module",
    }
    weights = {}
    for name, tensor in small_model.upstream_state_dict().items():
        for pattern, wrapped in names.items():
            name = re.sub(pattern, wrapped, name)
        weights[f"module.{name}"] = tensor
    target = other(small_model)
    target.load_upstream_state_dict(weights)
    assert_same_weights(target, small_model)


@pytest.mark.parametrize("container", ["state_dict", "model", "module", "model_state_dict"])
def test_training_checkpoints_of_other_loops(small_model, container):
    target = other(small_model)
    target.load_upstream_state_dict(
        {"epoch": 3, container: small_model.upstream_state_dict(), "optimizer": {"lr": 1.0}}
    )
    assert_same_weights(target, small_model)


@pytest.mark.parametrize("container", ["ema", "ema_state_dict", "model_ema"])
def test_an_average_is_taken_where_there_is_no_other(small_model, container):
    target, average = other(small_model), other(small_model)
    with torch.no_grad():
        for parameter in average.parameters():
            parameter += 1
    both = {container: average.upstream_state_dict(), "model": small_model.upstream_state_dict()}
    target.load_upstream_state_dict(both)
    assert_same_weights(target, small_model)
    target.load_upstream_state_dict({"epoch": 3, container: both[container]})
    assert_same_weights(target, average)


def test_an_averaged_model(small_model):
    averaged = torch.optim.swa_utils.AveragedModel(torch.nn.Linear(2, 2)).state_dict()
    weights = {f"module.{name}": t for name, t in small_model.upstream_state_dict().items()}
    target = other(small_model)
    target.load_upstream_state_dict({"n_averaged": averaged["n_averaged"], **weights})
    assert_same_weights(target, small_model)


def test_two_tensors_of_one_name_are_refused(small_model):
    weights = small_model.upstream_state_dict()
    target, before = other(small_model), other(small_model)
    with pytest.raises(RuntimeError, match=r"hold sparse_tokens twice, as sparse_tokens and as module\.sparse_tokens"):
        target.load_upstream_state_dict({**weights, "module.sparse_tokens": weights["sparse_tokens"] + 1})
    with pytest.raises(RuntimeError, match=r"hold the model 2 times, under student\., ema\."):
        target.load_upstream_state_dict({f"{p}.{name}": t for p in ("student", "ema") for name, t in weights.items()})
    with pytest.raises(ValueError, match="weights have names, but one of these is 0, of type int"):
        target.load_upstream_state_dict({0: weights["sparse_tokens"]})
    assert_same_weights(target, before)


def test_a_name_outside_of_the_prefix_is_unexpected(small_model):
    weights = {f"model.{name}": t for name, t in small_model.upstream_state_dict().items()}
    with pytest.raises(RuntimeError, match=r"model; unexpected tensors: loss\.scale$"):
        other(small_model).load_upstream_state_dict({**weights, "loss.scale": torch.ones(1)})


def test_a_message_names_five_and_counts_the_rest(small_model):
    with pytest.raises(RuntimeError) as error:
        small_model.load_upstream_state_dict({f"features.{i}.weight": torch.zeros(1) for i in range(40)})
    message = str(error.value)
    assert len(message) < 900
    missing = len(small_model.upstream_state_dict())
    assert (
        "missing tensors: encoder.embeddings.cls_token, " in message
        and f" and {missing - 5} more; unexpected" in message
    )
    assert "features.12.weight and 35 more; they hold 40 entries: features.0.weight, features.1.weight, " in message
    with pytest.raises(RuntimeError, match=r"they hold 0 entries: none$"):
        small_model.load_upstream_state_dict({})


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["blocks.0.attn.qkv.weight", "patch_embed.proj.weight"], r"a plain ViT: vit_pretrained= starts from it$"),
        (["vit.embeddings.patch_embeddings.projection.weight"], r"a plain ViT: vit_pretrained="),
        (["encoder.transformer.blocks.0.attn.qkv.weight"], r"this package's own modules: load_state_dict takes them$"),
        (["encoder.conv_in.weight", "quantize.embedding.weight"], r"a VQGAN: vq_model= takes it$"),
        (["encoder.blocks.0.lora_A.weight"], "wrapped modules: merge adapters"),
    ],
)
def test_a_message_says_what_the_weights_look_like(small_model, names, kind):
    with pytest.raises(RuntimeError, match=f"those look like {kind}"):
        small_model.load_upstream_state_dict({name: torch.zeros(1) for name in names})


def test_torchs_own_state_dict_is_recognised(small_model):
    with pytest.raises(RuntimeError, match=r"those look like this package's own modules: load_state_dict takes them$"):
        small_model.encoder.load_upstream_state_dict(small_model.encoder.state_dict())


@pytest.mark.parametrize("strict", [True, False])
def test_values_that_are_no_numbers_are_refused(small_model, strict):
    weights = small_model.upstream_state_dict()
    weights["sparse_tokens"][1, :3] = torch.nan
    weights["clustering_head.layer.weight"][0, 0] = -torch.inf
    target, before = other(small_model), other(small_model)
    message = r"sparse_tokens \(3 of 192 values\), clustering_head\.layer\.weight \(1 of 1,024 values\)$"
    with pytest.raises(ValueError, match=f"hold NaN, infinity or what .*: {message}"):
        target.load_upstream_state_dict(weights, strict=strict)
    assert_same_weights(target, before)
    StellarEncoder(SMALL_ENCODER, 4).load_upstream_state_dict(weights | {"sparse_tokens": torch.zeros(4, 48)})


def test_many_such_tensors_are_counted(small_model):
    weights = {name: torch.full_like(t, torch.inf) for name, t in small_model.upstream_state_dict().items()}
    with pytest.raises(ValueError, match=f" and {len(weights) - 5} more$"):
        small_model.load_upstream_state_dict(weights)


def test_what_16_bits_do_not_hold_is_refused(small_model):
    weights = small_model.upstream_state_dict()
    weights["sparse_tokens"][0, 0] = 1e5
    small_model.load_upstream_state_dict(weights)
    with pytest.raises(ValueError, match=r"sparse_tokens \(1 of 192 values\)"):
        small_model.half().load_upstream_state_dict(weights)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            torch.zeros(4, 48, dtype=torch.int8),
            r"sparse_tokens is torch\.int8, torch\.strided, not dense floating point",
        ),
        (torch.zeros(4, 48, dtype=torch.complex64), r"is torch\.complex64"),
        (torch.zeros(4, 48).to_sparse(), r"is torch\.float32, torch\.sparse_coo, not dense"),
        (torch.zeros(4, 48, device="meta"), "is on the meta device, not dense"),
        ([[0.0] * 48] * 4, "sparse_tokens is a list, not a tensor"),
    ],
)
def test_tensors_of_another_kind_are_refused(small_model, given, message):
    with pytest.raises(RuntimeError, match=f"unfit tensors: .*{message}"):
        small_model.load_upstream_state_dict(small_model.upstream_state_dict() | {"sparse_tokens": given})


def test_weights_of_other_formats_fill_a_model(small_model):
    """Of 8, 16 and 64 bits, on no device's strides in particular."""
    weights = small_model.upstream_state_dict()
    tokens = weights["sparse_tokens"]
    for given in (tokens.double(), tokens.bfloat16(), tokens.half().mT.contiguous().mT, tokens.to(torch.float8_e4m3fn)):
        small_model.load_upstream_state_dict(weights | {"sparse_tokens": given})
        assert torch.equal(small_model.encoder.sparse_tokens, given.float())


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
    assert_alike(encode.encode(images)["sparse"], model.encode(images)["sparse"])
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


def test_errors_name_the_file(small_model, tmp_path):
    small_model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    save_file({**weights, "sparse_tokens": torch.full((4, 48), torch.nan)}, path)
    for kind in (StellarModel, StellarEncoder):
        with pytest.raises(ValueError, match=rf"^{path}: the weights hold NaN.*: sparse_tokens \(192 of 192 values\)$"):
            kind.from_pretrained(tmp_path)
    del weights["sparse_tokens"]
    save_file(weights, path)
    with pytest.raises(
        RuntimeError, match=rf"^{path}: the weights do not fit the model; missing tensors: sparse_tokens"
    ):
        StellarModel.from_pretrained(tmp_path)


def test_a_run_is_its_newest_good_checkpoint(small_model, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match=f"^{run} is a training run without a checkpoint yet$"):
        StellarEncoder.from_pretrained(run)
    for step in (1, 2, 3):
        with torch.no_grad():
            small_model.encoder.sparse_tokens += step
        if step == 2:
            second = small_model.upstream_state_dict()
        save_checkpoint(run / "checkpoints", step, small_model, {}, {}, keep=3)
    broken = run / "checkpoints" / "step_00000003" / "train.pt"
    broken.write_bytes(b"")
    for path in (run, run / "checkpoints", f"{run}/"):
        with pytest.warns(UserWarning, match=r"checkpoint refused: .*step_00000003 is damaged: train\.pt"):
            model = from_pretrained(path)
        assert mismatches(model.upstream_state_dict(), second, absolute=0, relative=0) == []
        with pytest.warns(UserWarning, match="checkpoint refused"):
            encoder = StellarEncoder.from_pretrained(path)
        assert torch.equal(encoder.sparse_tokens, second["sparse_tokens"])
    for step in (1, 2):
        (run / "checkpoints" / f"step_0000000{step}" / "meta.json").unlink()
    with pytest.raises(ValueError, match=r"step_00000003 is damaged: train\.pt"):
        StellarModel.from_pretrained(run)


def test_an_unreadable_file_says_so_before_it_asks_for_a_model(tmp_path):
    (tmp_path / "weights.bin").write_text("<html>")
    with pytest.raises(ValueError, match=r"weights\.bin: it is a web page"):
        StellarModel.from_pretrained(tmp_path / "weights.bin")


def test_folders_without_weights_say_so(small_model, tmp_path):
    with pytest.raises(
        ValueError,
        match=rf"^{tmp_path} is no directory of a model: there is no config\.json with 'stellar_fast' .* in it$",
    ):
        StellarModel.from_pretrained(tmp_path)
    save_file(small_model.upstream_state_dict(), tmp_path / "stellar-b16.safetensors")
    with pytest.raises(ValueError, match=rf"name the file itself and its model=: {tmp_path}/stellar-b16\.safetensors$"):
        StellarModel.from_pretrained(tmp_path, model="b16")
    (tmp_path / "config.json").write_text(json.dumps({"stellar_fast": []}))
    with pytest.raises(ValueError, match=r"config\.json: 'stellar_fast' must hold an object but holds a list"):
        StellarModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"stellar_fast": small_model.config}))
    with pytest.raises(FileNotFoundError, match=f"no weights file at {tmp_path}/model.safetensors"):
        StellarModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the path of the weights is empty"):
        StellarModel.from_pretrained("")
    with pytest.raises(ValueError, match="the path of the weights is empty"):
        StellarModel(SMALL_ENCODER, SMALL_DECODER, vq_model="", **SMALL_KWARGS)
    with pytest.raises(ValueError, match="vit_pretrained is empty"):
        StellarModel(SMALL_ENCODER, SMALL_DECODER, vit_pretrained="", **SMALL_KWARGS)


@pytest.mark.parametrize(
    "load",
    [
        lambda name: StellarModel.from_pretrained(name),
        lambda name: StellarEncoder.from_pretrained(name),
        lambda name: StellarModel(SMALL_ENCODER, SMALL_DECODER, vit_pretrained=name, **SMALL_KWARGS),
    ],
)
def test_a_mistyped_path_that_looks_like_a_repository(load, monkeypatch):
    """Whatever huggingface_hub raises, the sentence begins with what was asked for."""

    def offline(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("No connection.\nAnd much more.")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    monkeypatch.setattr(huggingface_hub.hub_mixin, "hf_hub_download", offline)
    with pytest.raises(
        FileNotFoundError, match=r"^rnus/first is neither a file .* the hub gives none: No connection\.$"
    ):
        load("rnus/first")


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
    assert_alike(model.encoder.pos_embed.data, torch.full((1, 17, 48), 0.5))


def test_tokenizer_tensors_fill_the_vqgan():
    case = read_golden("vq")
    model = case.model()
    expected = {n.removeprefix("tokenizer."): t for n, t in case.part("weights").items() if n.startswith("tokenizer.")}
    assert set(expected) == set(model.tokenizer.state_dict())
    assert mismatches(model.tokenizer.state_dict(), expected, absolute=0, relative=0) == []
