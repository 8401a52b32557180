"""Candidates of the real operators: all are right, and what is not is found."""

import math
import sys

import pytest
import torch

from stellar_fast.backend import OPS
from stellar_fast.registry import load
from stellar_fast.tune import bench as module
from stellar_fast.tune import plan
from stellar_fast.tune.bench import Bench, RejectedError, changed

CPU, FP32 = torch.device("cpu"), torch.float32


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)  # more than there may be cores
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("op", plan.tunable_ops("cpu"))
def test_every_candidate_of_an_operator_is_right(op, three_threads):
    bench = Bench(op, load(op).shapes["small"], FP32, CPU)
    (case,) = bench.cases
    assert len(case.candidates) > 2 and set(case.shape) <= {"T", "Q", *load(op).shapes["small"]}
    for config in case.candidates:
        samples = bench.measure(0, config, 2)
        assert len(samples.ms) == len(samples.heuristic_ms) == 2
        assert all(0 < ms < math.inf for ms in samples.ms + samples.heuristic_ms)


def raising(*_):
    raise RuntimeError("out of resources")


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (lambda way, grad, x, sums: 1.01 * grad.t() @ x, "wrong: gradient of weight is 0.0.* off fp64"),
        (lambda way, grad, x, sums: torch.empty(grad.shape[1], x.shape[1]), "wrong: gradient of weight is nan"),
        (raising, "crashed: RuntimeError: out of resources"),
    ],
    ids=["a wrong result", "nothing written", "an exception"],
)
def test_a_candidate_that_is_wrong_gets_no_time(monkeypatch, broken, reason):
    door = sys.modules["stellar_fast.ops.linear"]
    works = door._grad_weight_of_slice
    monkeypatch.setattr(
        door, "_grad_weight_of_slice", lambda way, *a: (broken if way == "inner_product" else works)(way, *a)
    )
    bench = Bench("linear", load("linear").shapes["small"], FP32, CPU)
    (case,) = bench.cases
    for config in case.candidates:
        if config["grad_weight"]["way"] == "inner_product":
            with pytest.raises(RejectedError, match=reason):
                bench.measure(0, config, 1)
        else:
            bench.measure(0, config, 1)


def test_an_operator_that_is_wrong_as_it_is_is_not_tuned(monkeypatch):
    door = sys.modules["stellar_fast.ops.linear"]
    works = door.product
    monkeypatch.setattr(door, "product", lambda name, *a: works(name, *a) * (1.01 if name == "forward" else 1))
    with pytest.raises(ValueError, match=r"linear is wrong with the heuristic's knobs: output 0 is 0.01 off fp64"):
        Bench("linear", load("linear").shapes["small"], FP32, CPU)


def test_an_operator_without_knobs_says_so():
    with pytest.raises(ValueError, match="crop_resize has no launch knobs on cpu; these have: add_layer_norm, "):
        plan.check_ops(["crop_resize"], "cpu")
    with pytest.raises(ValueError, match="unknown operator 'sink'; these have: "):
        plan.check_ops(["sink"], "cpu")


def test_shapes_of_a_preset_are_those_of_its_training_step():
    shapes = plan.preset_shapes("b16", 2)
    assert set(plan.tunable_ops("cpu")) <= set(shapes)
    for op, found in shapes.items():
        plain = {letter for shape in load(op).shapes.values() for letter in shape}
        assert found and all(set(shape) <= plain for shape in found), op
    # as the specs have them for two images
    assert shapes["add_layer_norm"][0] == load("add_layer_norm").shapes["b16"]
    for name in ("b16", "b16_qkv", "b16_proj", "b16_gelu_input"):
        assert load("linear").shapes[name] in shapes["linear"]
    assert {"N": 16, "Lq": 17, "Lk": 56, "H": 12, "d": 64} in shapes["token_attention"]
    assert {"R": 2 * 9 * 16, "T": 32, "C": 16384, "E": 256} in shapes["prototype_cross_entropy"]
    assert len({tuple(shape[letter] for letter in "BCHW") for shape in shapes["group_norm_silu"]}) == len(
        shapes["group_norm_silu"]
    )
    with pytest.raises(ValueError, match="batch must be at least 1 but is 0"):
        plan.preset_shapes("b16", 0)
    assert plan.named_shapes(["koleo", "linear"], ["b16_qkv"]) == {
        "koleo": [],
        "linear": [load("linear").shapes["b16_qkv"]],
    }
    with pytest.raises(ValueError, match="no shape is called 'b17'; koleo have b16, b16_masked, h16, small"):
        plan.named_shapes(["koleo"], ["b17"])


@pytest.mark.interpreter
@pytest.mark.parametrize("op", [op for op, written in OPS.items() if "triton" in written])
def test_knobs_of_triton_kernels(monkeypatch, op):
    """As on a GPU: what the door asks for in each pass, candidates by their JSON, one of each kind measured."""
    monkeypatch.setattr(module, "tuned_backend", lambda op, device: "triton")
    bench = Bench(op, load(op).shapes["small"], FP32, CPU)
    for index, case in enumerate(bench.cases):
        start, *others = case.candidates
        kinds = {changed(start, config): config for config in others}
        assert kinds and all(set(kind) <= set(start) for kind in kinds)
        for config in kinds.values():
            assert len(bench.measure(index, config, 1).ms) == 1
