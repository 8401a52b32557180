import copy
import math

import pytest
import torch
from torch import nn

from stellar_fast.train.optim import SkippingAdamW, learning_rate, parameter_groups


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.norm = nn.LayerNorm(2)
        self.cls_token = nn.Parameter(torch.ones(1, 1, 2))
        self.pos_embed = nn.Parameter(torch.ones(1, 4, 2))
        self.sparse_tokens = nn.Parameter(torch.ones(4, 2))
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)


def test_only_matrices_decay() -> None:
    model = Small()
    decayed, plain = parameter_groups(model, 0.04)
    names = {id(p): name for name, p in model.named_parameters()}
    assert [names[id(p)] for p in decayed["params"]] == ["linear.weight"]
    assert decayed["weight_decay"] == 0.04
    assert {names[id(p)] for p in plain["params"]} == {
        *("linear.bias", "norm.weight", "norm.bias", "cls_token", "pos_embed", "sparse_tokens")
    }
    assert plain["weight_decay"] == 0.0


def test_a_skipped_step_leaves_no_trace() -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    reference = copy.deepcopy(model)
    optimizer = SkippingAdamW(parameter_groups(model, 0.1), 0.1, (0.9, 0.99))
    plain = torch.optim.AdamW(parameter_groups(reference, 0.1), lr=0.1, betas=(0.9, 0.99), foreach=False)
    x = torch.randn(4, 5)
    for skip in (1.0, 0.0, 1.0, 1.0, 0.0):  # also before the moments exist
        optimizer.zero_grad()
        (model(x).square().mean() * (float("nan") if skip else 1.0)).backward()
        optimizer.step_unless(torch.tensor(skip))
        if not skip:
            plain.zero_grad()
            reference(x).square().mean().backward()
            plain.step()
    for ours, expected in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7)
    assert all(float(state["step"]) == 2 for state in optimizer.state.values())


def test_learning_rate_rises_falls_and_ends() -> None:
    assert learning_rate(0.05, 1.0, warmup=0.1) == pytest.approx(0.5)
    assert learning_rate(0.1, 2.0, warmup=0.1) == pytest.approx(2.0)
    assert learning_rate(0.55, 1.0, warmup=0.1) == pytest.approx(0.5)
    assert learning_rate(1.0, 1.0, warmup=0.1, final=0.2) == pytest.approx(0.2)
    assert learning_rate(1.7, 1.0, warmup=0.1) == pytest.approx(0.0)  # the clock may overshoot
    assert learning_rate(0.25, 1.0, warmup=0.0) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
