"""torch's FLOP counter counts the operators: as many products as the plain formulas have."""

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from stellar_fast import StellarEncoder, StellarModel
from stellar_fast.backend import OPS, use_backend
from stellar_fast.ops.flops import FORMULAS
from stellar_fast.registry import load


def counted(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("op", sorted(OPS.keys() & FORMULAS.keys() - {"packed_patch_embed", "nearest_code"}))
def test_an_operator_counts_as_its_spec_says(op):
    spec = load(op)
    shape = spec.shapes["small"] if op != "token_attention" else {"N": 3, "Lq": 5, "Lk": 21, "H": 2, "d": 16}
    inputs = spec.make_inputs(shape, torch.float32, torch.device("cpu"), torch.Generator().manual_seed(0))
    backend = "onednn" if op == "linear" else "cpu"
    products = {"token_match": 2.0 * shape.get("B", 0) * shape.get("V", 0) * shape.get("K", 0) ** 2 * shape.get("D", 0)}
    with use_backend(**{op: backend}):
        assert counted(lambda: spec.function(**inputs)) == products.get(op, spec.flops(shape))


@pytest.mark.parametrize("op", ["linear", "conv3x3", "lowrank_product", "patch_unembed", "prototype_cross_entropy"])
def test_gradients_count_as_the_plain_formula(op):
    spec = load(op)
    shape = spec.shapes["small"]
    made = spec.make_inputs(shape, torch.float32, torch.device("cpu"), torch.Generator().manual_seed(0))
    inputs = {
        name: x.requires_grad_(name in spec.gradients) if isinstance(x, torch.Tensor) else x for name, x in made.items()
    }

    def step() -> None:
        out = spec.function(**inputs)
        (out[0] if isinstance(out, tuple) else out).sum().backward()

    with use_backend(**{op: "onednn" if op == "linear" else "cpu"}):
        ours = counted(step)
    again = op == "prototype_cross_entropy"  # of so few rows the logits are multiplied once more
    assert ours == (3 + again) * spec.flops(shape)


def test_an_encoding_and_a_training_step_count_as_the_reference(small_model: StellarModel, small_batch):
    encoder = StellarEncoder("tiny")
    images = torch.rand(2, 3, 96, 96)

    def encode() -> None:
        with torch.no_grad():
            encoder(images)

    def step() -> None:
        keep = torch.arange(8).expand(4, 8)
        small_model.loss(small_model(small_batch, keep_indices=keep)["predictions"]).total.backward()

    for work, tolerance in ((encode, 1e-3), (step, 0.05)):
        ours = counted(work)
        with use_backend("reference"):
            plain = counted(work)
        assert ours > 0 and abs(ours / plain - 1) <= tolerance, (ours, plain)


@pytest.mark.parametrize("first", ["torch.utils.flop_counter", "stellar_fast"])
def test_the_formulas_join_whichever_is_imported_first(first):
    second = {"stellar_fast": "torch.utils.flop_counter"}.get(first, "stellar_fast")
    code = (
        f"import torch, sys; import {first}; import {second}; from torch.utils.flop_counter import flop_registry as r; "
    )
    code += "import stellar_fast; print(sum('stellar_fast' in str(k) for k in r))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) == len(FORMULAS)
