"""The whole model against the golden tensors: outputs, losses, every gradient, teacher, matches and codes."""

import copy
import json
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from stellar_fast import StellarModel, VQGANConfig, backend
from tests.conftest import CASES, DEVICES, GOLDEN, GoldenCase, mismatches, read_golden
from tests.harness import INLINE

PIXEL_HEAD, CODE_HEAD = {"patch_unembed"}, {"conv3x3", "group_norm_silu", "nearest_code"}
NOT_IN_A_STEP = {"crop_resize", "upsample_conv2x"}  # of the data, and of codes that become images


def step_operators(name: str) -> set[str]:
    return backend.OPS.keys() - NOT_IN_A_STEP - (PIXEL_HEAD if name.startswith("vq") else CODE_HEAD)


def on_cpu(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: t.cpu() for name, t in tensors.items() if isinstance(t, Tensor)}


def train_once(model: StellarModel, case: GoldenCase, forward=None) -> dict[str, Tensor]:
    """One forward and backward; the predictions with the total, on the CPU."""
    device = model.encoder.sparse_tokens.device
    batch = {name: views.to(device) for name, views in case.part("input").items()}
    model.update_teacher()
    step = model if forward is None else forward
    predictions = step(batch, keep_indices=case.tensors["train.keep_indices"].to(device))["predictions"]
    total, _ = model.loss(predictions)
    total.backward()
    return on_cpu({**predictions, "total": total.detach()})


def assert_trains_as_golden(model: StellarModel, case: GoldenCase, forward=None) -> None:
    predictions = train_once(model, case, forward)
    assert mismatches(predictions, case.part("train")) == []
    gradients = on_cpu(model.upstream_gradients())
    assert set(gradients) == set(case.part("grad"))
    assert mismatches(gradients, case.part("grad"), absolute=1e-4) == []
    assert mismatches(on_cpu(model.upstream_state_dict()), case.part("after_update")) == []


@pytest.fixture
def exact_fp32():
    """No TF32 in a GPU's convolutions: the tolerances are those of fp32. Matrix products have none by default."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_eval_outputs(name, device, exact_fp32):
    case = read_golden(name)
    model = case.model().to(device)
    image = case.tensors["input.global_views"][:, 0].to(device)
    expected = {key: t for key, t in case.part("eval").items() if key != "vq_decode"}
    with torch.no_grad():
        output = model({"image": image}, mode="eval")["predictions"]
    assert mismatches(on_cpu(output), expected) == []
    assert set(expected) == set(output)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_training_step(name, device, exact_fp32):
    case = read_golden(name)
    assert_trains_as_golden(case.model().to(device), case)


def choices_of_backends():
    """(backend, device, case); Triton's kernels run under the interpreter and on a GPU."""
    for name in CASES:
        yield from ((chosen, "cpu", name) for chosen in ("reference", "torch", "cpu", "onednn"))
        yield from (pytest.param(chosen, "cuda", name, marks=pytest.mark.cuda) for chosen in ("triton", "cuda"))
        if name != "vq_patch14":  # a minute under the interpreter; patches of 14 pixels are among packed_patch_embed's
            yield pytest.param("triton", "cpu", name, marks=pytest.mark.interpreter)


@pytest.mark.parametrize(("chosen", "device", "name"), list(choices_of_backends()))
def test_training_step_on(chosen, device, name, exact_fp32):
    """All operators of the step that have the backend take it, and it is the one that runs."""
    case = read_golden(name)
    chosen_by_op = {op: chosen for op in step_operators(name) if chosen in backend.OPS[op]}
    assert chosen_by_op
    with backend.use_backend(**chosen_by_op), backend.observe() as ran:
        assert_trains_as_golden(case.model().to(device), case)
    if chosen not in INLINE:
        assert {op for op, name in ran if name == chosen} == set(chosen_by_op)


@pytest.mark.parametrize("name", CASES)
def test_training_step_in_fp64(name):
    case = read_golden(name)
    double = GoldenCase(case.meta, {k: t.double() if t.is_floating_point() else t for k, t in case.tensors.items()})
    assert_trains_as_golden(double.model().double(), double)


@pytest.mark.parametrize("name", CASES)
def test_training_step_with_gradient_checkpointing(name):
    case = read_golden(name)
    model = case.model()
    model.gradient_checkpointing_enable()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        assert_trains_as_golden(model, case)
    plain = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: plain.append(t.numel()) or t, lambda t: t):
        train_once(case.model(), case)
    assert sum(saved) < sum(plain), "checkpointing kept no fewer activations"


@pytest.mark.parametrize("name", CASES)
def test_training_step_compiled(name):
    torch._dynamo.reset()
    case = read_golden(name)
    model = case.model()
    assert_trains_as_golden(model, case, torch.compile(model, fullgraph=True, backend="aot_eager"))


def test_training_step_by_inductor():
    """As without it. It compiles a step for a minute, so that it gets one: codes of a VQGAN, and a teacher."""
    torch._dynamo.reset()
    case = read_golden("vq")
    model = case.model(momentum_teacher=True, teacher_momentum=0.9)
    eager = copy.deepcopy(model)
    compiled = train_once(model, case, torch.compile(model, fullgraph=True))
    assert mismatches(compiled, train_once(eager, case)) == []
    assert mismatches(model.upstream_gradients(), eager.upstream_gradients(), absolute=1e-4) == []
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["vq", "vq_patch14"])
def test_vqgan_decodes_predicted_codes(name):
    """With torch's GroupNorm the golden images; with ours fp64's, from which one golden image is 2.2e-5, ours 8e-6."""
    case = read_golden(name)
    model = case.model()
    codes = case.tensors["train.x_hat"].argmax(dim=-1)
    codes = codes.view(-1, *[math.isqrt(codes.shape[1])] * 2)
    golden = case.tensors["eval.vq_decode"]
    features = model.encode(case.tensors["input.global_views"][:, 0])
    assert model.tokenizer is not None
    with backend.use_backend(group_norm_silu="torch"):
        assert mismatches({"vq_decode": model.tokenizer.decode(codes)}, {"vq_decode": golden}) == []
        assert mismatches(model.reconstruct(features), {"reconstruction": golden}) == []
    image, exact = model.tokenizer.decode(codes), copy.deepcopy(model.tokenizer).double().decode(codes)
    assert mismatches({"vq_decode": image}, {"vq_decode": exact.float()}) == []
    assert torch.equal(model.reconstruct(features)["reconstruction"], image)


@pytest.mark.parametrize("name", CASES)
def test_weights_come_back_under_upstreams_names(name):
    case = read_golden(name)
    expected = {key: t for key, t in case.part("weights").items() if not key.startswith("tokenizer.")}
    exported = case.model().upstream_state_dict()
    assert set(exported) == set(expected)
    assert mismatches(exported, expected, absolute=0, relative=0) == []


@pytest.mark.parametrize("name", ["stellar-b16", "stellar-l16", "stellar-h16"])
def test_published_names_and_shapes(name):
    published = json.loads((GOLDEN / "upstream_state_dict_shapes.json").read_text())[name]
    with torch.device("meta"):
        model = StellarModel(name, vq_model=VQGANConfig())
    assert {key: list(t.shape) for key, t in model.upstream_state_dict().items()} == published
