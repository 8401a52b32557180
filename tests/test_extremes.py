"""Inputs far from the usual sizes: where fp32 serves the reference, a backend is right or its results not finite."""

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from stellar_fast.backend import OPS, use_backend
from stellar_fast.registry import load
from tests.harness import Case, _is_floating, backends_here
from tests.roundings import ALIKE

OPERATORS = [op for op in OPS if op != "crop_resize"]  # which takes pixels of files
FACTORS = {"1e-30": 2.0**-100, "1e-10": 2.0**-33, "1e4": 2.0**13, "1e10": 2.0**33, "1e18": 2.0**60}  # exact


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("op", OPERATORS)
def test_any_size_of_input(op: str, factor: str) -> None:
    case = Case(op, "small", torch.float32, "cpu", 0, {})
    case.inputs = tree_map(lambda x: x * FACTORS[factor] if _is_floating(x) else x, case.inputs)
    try:
        case.ours("reference", case.inputs)
        exact = case.exact()
    except ValueError:  # pixels over 1
        for backend in backends_here(op):
            with use_backend(**{op: backend}), pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
                load(op).function(**case.inputs)
        return
    right = {name for name, x in case.ours("reference", case.inputs).items() if not _reasons(x, exact[name])}
    wrong = []
    for backend in backends_here(op):
        found = case.ours(backend, case.inputs)
        assert found.keys() == exact.keys()
        wrong += [f"{backend}: {name} {text}" for name in right for text in _reasons(found[name], exact[name])]
    assert wrong == []


def _reasons(found: Tensor, exact: Tensor) -> list[str]:
    found, exact = found.double(), exact.double()
    size = exact.nan_to_num(0, 0, 0).abs().max().item()
    right = (found - exact).abs() <= ALIKE[torch.float32] * size + torch.finfo(torch.float32).tiny
    right |= ~(exact.abs() <= torch.finfo(torch.float32).max)
    if (found.isfinite() & ~right).any():
        return [f"is finite and wrong, by {(found - exact).abs().nan_to_num(0, 0, 0).max().item():.3g} of {size:.3g}"]
    held = exact.isfinite().all() and size < torch.finfo(torch.float32).max / 1e6  # what is on its way may be larger
    return ["is not finite"] if held and not right.all() else []
