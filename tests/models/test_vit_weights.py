"""Starts from plain ViTs: training checkpoints of DINO and DINOv2, LayerScale, position tables, and what is refused."""

import argparse
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from stellar_fast import StellarEncoder, StellarModel
from stellar_fast.models.vit_weights import load_vit_state_dict
from stellar_fast.models.weights import WeightsMismatchError
from tests.conftest import SMALL_DECODER, SMALL_ENCODER, SMALL_KWARGS, mismatches

NOT_OF_A_TRUNK = r"pooler|sparse|dense"


def build(seed: int = 0) -> StellarEncoder:
    torch.manual_seed(seed)
    return StellarEncoder(SMALL_ENCODER, 4)


def trunk(encoder: StellarEncoder) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in encoder.state_dict().items() if not re.match(NOT_OF_A_TRUNK, name)}


def timm(seed: int = 1) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A trunk, and its tensors under timm's, DINO's and MAE's names."""
    tensors = trunk(build(seed))
    for name, t in tensors.items():  # no biases of zero
        tensors[name] = t + 0.01 * torch.randn_like(t)
    names = {
        name: re.sub(r"^patch_embed\.", "patch_embed.proj.", name).removeprefix("transformer.") for name in tensors
    }
    return tensors, {names[name]: t for name, t in tensors.items()}


def dinov2_of_hugging_face(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same under the names of transformers' Dinov2Model."""
    renamed = {}
    for name, t in tensors.items():
        name = re.sub(r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection.", name)
        name = re.sub(r"^cls_token", "embeddings.cls_token", name)
        name = re.sub(r"^pos_embed", "embeddings.position_embeddings", name)
        name = re.sub(r"^norm\.", "layernorm.", name)
        name = re.sub(r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layer.\1.attention.output.dense.", name)
        name = re.sub(r"^blocks\.(\d+)\.ls(\d)\.gamma", r"encoder.layer.\1.layer_scale\2.lambda1", name)
        name = re.sub(r"^blocks\.", "encoder.layer.", name)
        match = re.fullmatch(r"(encoder\.layer\.\d+)\.attn\.qkv\.(\w+)", name)
        parts = zip(("query", "key", "value"), t.chunk(3), strict=True) if match else ()
        renamed |= {f"{match[1]}.attention.attention.{x}.{match[2]}": part for x, part in parts} or {name: t}
    return renamed


def chunked(names: dict[str, Tensor]) -> dict[str, Tensor]:
    """Blocks in chunks of one, which count on, as DINOv2 trains them."""
    return {re.sub(r"^blocks\.(\d+)\.", r"blocks.\1.\1.", name): t for name, t in names.items()}


def under(prefix: str, names: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: t for name, t in names.items()}


def assert_started_from(weights: dict, expected: dict[str, Tensor]) -> None:
    encoder = build()
    before = encoder.state_dict()
    kept = {name: t.clone() for name, t in before.items() if re.match(NOT_OF_A_TRUNK, name)}
    load_vit_state_dict(encoder, weights)
    assert mismatches(encoder.state_dict(), expected, absolute=0, relative=0) == []
    assert mismatches(encoder.state_dict(), kept, absolute=0, relative=0) == []


def test_a_training_checkpoint_of_dino(tmp_path):
    expected, names = timm()
    head = {"head.mlp.0.weight": torch.zeros(4, 48), "head.last_layer.weight_g": torch.ones(9, 1)}
    student = under("module.", under("backbone.", {n: t + 1 for n, t in names.items()}) | head)
    checkpoint = {
        "student": student,
        "teacher": under("backbone.", names) | head,
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": np.float64(0.1)}]},
        "epoch": 30,
        "args": argparse.Namespace(arch="vit_small", patch_size=8),
        "dino_loss": {"center": torch.zeros(1, 9)},
    }
    torch.save(checkpoint, tmp_path / "checkpoint.pth")
    model = StellarModel(SMALL_ENCODER, SMALL_DECODER, vit_pretrained=tmp_path / "checkpoint.pth", **SMALL_KWARGS)
    assert mismatches(model.encoder.state_dict(), expected, absolute=0, relative=0) == []
    del checkpoint["teacher"]
    assert_started_from(checkpoint, {name: t + 1 for name, t in expected.items()})


@pytest.mark.parametrize("container", ["model", "teacher", None])
@pytest.mark.parametrize("wrapper", ["", "_fsdp_wrapped_module."])
def test_a_training_checkpoint_of_dinov2(container, wrapper):
    expected, names = timm()
    names = chunked(names) | {"mask_token": torch.zeros(1, 48)}
    heads = {"dino_head.mlp.0.weight": torch.zeros(4, 48), "ibot_head.mlp.0.weight": torch.zeros(4, 48)}
    teacher = under(f"{wrapper}backbone.{wrapper}", names) | heads
    student = under(f"{wrapper}backbone.{wrapper}", {n: t + 1 for n, t in names.items()}) | heads
    whole = under("teacher.", teacher) | under("student.", student)
    weights = {"model": {"model": whole, "iteration": 5}, "teacher": {"teacher": teacher}, None: whole}[container]
    assert_started_from(weights, expected)


@pytest.mark.parametrize("names_of", [lambda n: n, chunked, dinov2_of_hugging_face])
def test_layer_scale_is_in_the_weights(names_of):
    expected, names = timm()
    x = torch.randn(5, 48, dtype=torch.float64)
    scaled = {}
    for i in range(2):
        for ls, linear in ((1, "attn.proj"), (2, "mlp.fc2")):
            gamma = torch.rand(48)
            names[f"blocks.{i}.ls{ls}.gamma"] = gamma
            scaled[f"transformer.blocks.{i}.{linear}"] = gamma
    encoder = build()
    load_vit_state_dict(encoder, names_of(names))
    for linear, gamma in scaled.items():
        weight, bias = (expected[f"{linear}.{part}"].double() for part in ("weight", "bias"))
        x = torch.randn(5, weight.shape[1], dtype=torch.float64)
        want = gamma * F.linear(x, weight, bias)
        found = encoder.get_submodule(linear).double()
        torch.testing.assert_close(F.linear(x, found.weight, found.bias), want, rtol=1e-5, atol=1e-6)
        for part in ("weight", "bias"):
            del expected[f"{linear}.{part}"]
    assert mismatches(encoder.float().state_dict(), expected, absolute=0, relative=0) == []


def test_the_layer_scale_of_deit_3():
    expected, names = timm()
    names["blocks.1.gamma_2"] = torch.full((48,), 0.5)
    for part in ("weight", "bias"):
        expected[f"transformer.blocks.1.mlp.fc2.{part}"] = 0.5 * expected[f"transformer.blocks.1.mlp.fc2.{part}"]
    assert_started_from(names, expected)


@pytest.mark.parametrize(
    "prefix", ["", "module.", "vit.", "model.vit.", "backbone.", "base_encoder.", "module.visual.trunk.", "_orig_mod."]
)
@pytest.mark.parametrize("names_of", [lambda n: n, dinov2_of_hugging_face])
def test_any_prefix_of_one_trunk(prefix, names_of):
    expected, names = timm()
    others = {"head.weight": torch.zeros(3), "decoder.blocks.0.norm1.weight": torch.zeros(3)}
    assert_started_from(under(prefix, names_of(names)) | others, expected)
    assert_started_from({"state_dict": under(prefix, names_of(names)), "epoch": 1}, expected)


@pytest.mark.parametrize("side", [4, 8])
@pytest.mark.parametrize("has_class", [True, False])
@pytest.mark.parametrize("lay", [lambda t: t, lambda t: t[0], lambda t: t.half()], ids=["1PD", "PD", "half"])
def test_position_tables(side, has_class, lay):
    expected, names = timm()
    table = lay(torch.randn(1, has_class + side * side, 48))
    names["pos_embed"] = table
    rows = table.float().reshape(-1, 48)
    cls, patches = (rows[:1], rows[1:]) if has_class else (torch.zeros(1, 48), rows)
    if side != 4:
        patches = patches.T.reshape(1, 48, side, side)
        patches = F.interpolate(patches, size=(4, 4), mode="bicubic", align_corners=False).flatten(2)[0].T
    expected["pos_embed"] = torch.cat((cls, patches))[None]
    assert_started_from(names, expected)


def test_a_position_table_as_a_grid():
    expected, names = timm()
    names["pos_embed"] = expected["pos_embed"][:, 1:].unflatten(1, (4, 4)).clone()
    expected["pos_embed"][:, 0] = 0
    assert_started_from(names, expected)


@pytest.mark.parametrize("shape", [(1, 21, 48), (1, 13, 48), (12, 48), (1, 3, 5, 48), (1, 0, 48)])
def test_position_tables_that_are_not_square_are_refused(shape):
    _, names = timm()
    message = (
        rf"pos_embed is {re.escape(str(shape))}: no square grid .* register tokens .* \(1, 17, 48\), a grid of 4 x 4"
    )
    with pytest.raises(WeightsMismatchError, match=message):
        load_vit_state_dict(build(), names | {"pos_embed": torch.zeros(shape)})


def test_a_position_table_of_another_width_is_refused():
    _, names = timm()
    with pytest.raises(WeightsMismatchError, match=r"pos_embed is \(1, 17, 32\) but the model needs \(1, 17, 48\)"):
        load_vit_state_dict(build(), names | {"pos_embed": torch.zeros(1, 17, 32)})


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"reg_token": (1, 4, 48)}, r"a trunk with register tokens, which this one has not: reg_token$"),
        ({"register_tokens": (1, 4, 48)}, r"register tokens, .*: register_tokens$"),
        ({"blocks.0.mlp.w12.weight": (2, 2)}, r"a SwiGLU, .*: blocks\.0\.mlp\.w12\.weight$"),
        ({"blocks.0.attn.q_norm.weight": (16,)}, "norms of queries and keys"),
        ({"dist_token": (1, 1, 48)}, "a distillation token"),
        ({"rope.freqs": (16,)}, r"unexpected tensors: rope\.freqs"),
        ({"blocks.2.norm1.weight": (48,)}, r"unexpected tensors: blocks\.2\.norm1\.weight"),
        ({"blocks.0.gamma_1": (7,)}, r"unexpected tensors: blocks\.0\.gamma_1"),
        ({"norm_pre.weight": (48,)}, r"unexpected tensors: norm_pre\.weight"),
        ({"blocks.0.1.norm1.weight": (48,)}, r"hold blocks\.1\.norm1\.weight twice, .* as blocks\.0\.1\."),
        ({"teachers.patch_embed.proj.weight": (1,), "ema.patch_embed.proj.weight": (1,)}, None),
        ({"sparse_tokens": (4, 48)}, "of a STELLAR model, not of a plain ViT: from_pretrained loads them"),
    ],
)  # fmt: skip
def test_other_trunks_are_refused(extra, message):
    expected, names = timm()
    weights = names | {name: torch.zeros(shape) for name, shape in extra.items()}
    if message is None:  # the trunk without a prefix is meant
        assert_started_from(weights, expected)
        return
    encoder = build()
    before = trunk(encoder)
    with pytest.raises(WeightsMismatchError, match=message):
        load_vit_state_dict(encoder, weights)
    assert mismatches(trunk(encoder), before, absolute=0, relative=0) == []


def test_several_trunks_are_refused():
    _, names = timm()
    weights = under("base_encoder.", names) | under("momentum_encoder.", names)
    with pytest.raises(
        WeightsMismatchError, match=r"2 trunks, under base_encoder\., momentum_encoder\.: give those of one"
    ):
        load_vit_state_dict(build(), weights)


def test_weights_without_a_trunk_say_what_they_are(tmp_path):
    save_file({"conv1.weight": torch.zeros(3), "layer1.0.bn1.bias": torch.zeros(3)}, tmp_path / "resnet.safetensors")
    with pytest.raises(WeightsMismatchError) as error:
        StellarModel(SMALL_ENCODER, SMALL_DECODER, vit_pretrained=tmp_path / "resnet.safetensors", **SMALL_KWARGS)
    message = str(error.value)
    assert message.startswith(f"{tmp_path}/resnet.safetensors: the weights do not fit the model; missing tensors: ")
    assert "they hold 2 entries: conv1.weight, layer1.0.bn1.bias" in message


def test_values_that_are_no_numbers_are_refused(tmp_path):
    _, names = timm()
    names["blocks.1.mlp.fc1.bias"][3] = torch.nan
    torch.save({"model": names}, tmp_path / "vit.pth")
    with pytest.raises(
        ValueError, match=r"vit\.pth: the weights hold NaN.*: blocks\.1\.mlp\.fc1\.bias \(1 of 96 values\)"
    ):
        StellarModel(SMALL_ENCODER, SMALL_DECODER, vit_pretrained=tmp_path / "vit.pth", **SMALL_KWARGS)
