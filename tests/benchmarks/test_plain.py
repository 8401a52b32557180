"""The plain model against the golden tensors: what ratios stand on has to be right itself."""

import ast
import functools
import inspect
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from benchmarks import plain
from benchmarks.plain import PlainStellar, PlainVQGAN
from benchmarks.plain.model import PositionEmbedding
from benchmarks.plain.objectives import koleo, match_tokens, sinkhorn, soft_cross_entropy

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
CASES = sorted(path.stem for path in GOLDEN.glob("*.safetensors") if path.stem != "ops")


def load(name: str) -> tuple[dict, dict[str, Tensor]]:
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        return json.loads(file.metadata()["meta"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def known_arguments(cls: type, arguments: dict) -> dict:
    """The plain classes take the arguments that change the mathematics; views and masks come with the batch."""
    return {k: v for k, v in arguments.items() if k in inspect.signature(cls).parameters}


@dataclass
class Run:
    """What one golden case expects, and what the plain model gave, by the golden names."""

    expected: dict[str, Tensor]
    found: dict[str, Tensor]

    def of(self, prefix: str, but: tuple[str, ...] = ()) -> list[tuple[str, Tensor, Tensor]]:
        names = [name for name in self.expected if name.startswith(prefix) and name not in but]
        return [(name, self.found[name].detach(), self.expected[name]) for name in names]


@functools.cache
def run(name: str) -> Run:
    meta, golden = load(name)
    vqgan = meta["vqgan"] and known_arguments(PlainVQGAN, meta["vqgan"])
    arguments = known_arguments(PlainStellar, meta["kwargs"])
    hidden = meta["predictor_hidden_dim"]
    model = PlainStellar(meta["encoder"], meta["decoder"], vqgan, predictor_hidden_dim=hidden, **arguments)
    weights = {key.removeprefix("weights."): value for key, value in golden.items() if key.startswith("weights.")}
    model.load_state_dict(weights, strict=True)
    assert model.recon_weight == meta["reconstruction_coeff"]

    views = {"global_views": golden["input.global_views"], "local_views": golden["input.local_views"]}
    found = {f"eval.{key}": value for key, value in model.encode(views["global_views"][:, 0]).items()}
    if model.momentum_teacher:
        model.update_teacher()
        found |= {f"after_update.{key}": value.clone() for key, value in model.state_dict().items()}
    predictions = model(views, golden["train.keep_indices"])
    total = model.loss(predictions)
    total.backward()
    found |= {f"train.{key}": value for key, value in predictions.items()} | {"train.total": total}
    found |= {f"grad.{key}": value.grad for key, value in model.named_parameters() if value.grad is not None}
    if model.tokenizer is not None:
        codes = golden["train.x_hat"].argmax(-1)
        side = int(codes.shape[1] ** 0.5)
        found["eval.vq_decode"] = model.tokenizer.decode(codes.unflatten(1, (side, side)))
    return Run(golden, found)


def assert_within(found: Tensor, expected: Tensor, absolute: float, name: str) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=absolute, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("case", CASES)
def test_outputs(case: str) -> None:
    compared = run(case).of("eval.")
    assert len(compared) >= 7
    for name, found, expected in compared:
        assert_within(found, expected, 1e-5, name)


@pytest.mark.parametrize("case", CASES)
def test_losses_image_codes_and_matches(case: str) -> None:
    compared = run(case).of("train.", but=("train.keep_indices",))
    assert {"train.total", "train.x_hat", "train.match_index_masked"} <= {name for name, _, _ in compared}
    for name, found, expected in compared:
        assert_within(found, expected, 1e-5 if expected.is_floating_point() else 0, name)


@pytest.mark.parametrize("case", CASES)
def test_every_gradient(case: str) -> None:
    result = run(case)
    assert {n for n in result.found if n.startswith("grad.")} == {n for n in result.expected if n.startswith("grad.")}
    for name, found, expected in result.of("grad."):
        assert_within(found, expected, 1e-4, name)


def test_teacher_weights_after_the_update() -> None:
    compared = run("momentum").of("after_update.")
    assert any(name.startswith("after_update.teacher_encoder.pooler") for name, _, _ in compared)
    for name, found, expected in compared:
        assert_within(found, expected, 1e-6, name)


@pytest.mark.parametrize("preset", ["stellar-b16", "stellar-l16", "stellar-h16"])
def test_names_and_shapes_are_upstreams(preset: str) -> None:
    expected = json.loads((GOLDEN / "upstream_state_dict_shapes.json").read_text())[preset]
    width, _, _, patch = expected["encoder.embeddings.patch_embeddings.projection.weight"]
    layers = max(int(name.split(".")[3]) for name in expected if name.startswith("encoder.encoder.layer")) + 1
    encoder = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "intermediate_size": 4 * width,
    }
    decoder = {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 2048}
    with torch.device("meta"):
        model = PlainStellar(
            encoder | {"image_size": 224, "patch_size": patch},
            decoder | {"image_size": 224, "patch_size": 16},
            vqgan={},
        )
    shapes = {
        name: list(value.shape) for name, value in model.state_dict().items() if not name.startswith("tokenizer.")
    }
    assert shapes == expected


def test_objectives_alone() -> None:
    _, ops = load("ops")
    assert_within(sinkhorn(ops["sinkhorn.logits_over_temp"]), ops["sinkhorn.out_scale1"], 1e-5, "sinkhorn")
    scaled = sinkhorn(ops["sinkhorn.logits_over_temp"], scale=0.7)
    assert_within(scaled, ops["sinkhorn.out_scale0.7"], 1e-5, "sinkhorn, scaled")
    assert_within(sinkhorn(ops["sinkhorn_outliers.logits_over_temp"]), ops["sinkhorn_outliers.out"], 1e-5, "outliers")
    assert torch.equal(match_tokens(ops["match.pred"], ops["match.target"]), ops["match.index"])
    loss = soft_cross_entropy(ops["head_eps.logits"], ops["head_eps.assignments"], 0.12)
    assert_within(loss, ops["head_eps.loss"], 1e-5, "cross-entropy")
    position = PositionEmbedding(64)
    position.positional_encoding_gaussian_matrix.copy_(ops["posenc.gaussian"])
    assert_within(position(14, 14).t().reshape(64, 14, 14), ops["posenc.out_14x14x64"], 1e-5, "position")


@pytest.mark.parametrize("name", ["koleo", "koleo_eps"])
def test_koleo_and_its_gradient(name: str) -> None:
    _, ops = load("ops")
    tokens = ops[f"{name}.x"].clone().requires_grad_()
    loss = koleo(tokens)
    loss.backward()
    assert_within(loss.detach(), ops[f"{name}.loss"], 1e-5, name)
    assert_within(tokens.grad, ops[f"{name}.grad"], 1e-4, f"{name} gradient")


def test_plain_stands_alone() -> None:
    imported = set()
    for path in Path(plain.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
    assert imported == {"torch", "benchmarks", "collections", "copy", "itertools", "math"}
