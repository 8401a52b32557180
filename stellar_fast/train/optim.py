"""The optimizer: AdamW that can be told on the device to leave a step out, and its learning rate."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_NO_DECAY = ("cls_token", "pos_embed", "sparse_tokens")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Split the trained parameters: matrices and kernels decay; norms, biases, tokens and positions do not."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            exempt = parameter.ndim < 2 or name.endswith(_NO_DECAY)
            (plain if exempt else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


class SkippingAdamW(torch.optim.AdamW):
    """Fused AdamW whose `step_unless(skip)` leaves weights, moments and step counts untouched where `skip` is 1.

    `skip` is a 0-dim float32 tensor on the parameters' device; the host never reads it. The fused kernels have this
    switch for torch.amp.GradScaler, which is what `found_inf` is named after.
    """

    def __init__(self, groups: list[dict], lr: float, betas: tuple[float, float]) -> None:
        super().__init__([group for group in groups if group["params"]], lr=lr, betas=betas, fused=True)
        self.grad_scale = None

    def step_unless(self, skip: Tensor) -> None:
        self.found_inf = skip
        self.step()

    def set_lr(self, lr: float) -> None:
        for group in self.param_groups:
            group["lr"] = lr


def learning_rate(progress: float, peak: float, warmup: float, final: float = 0.0) -> float:
    """Linear warm-up, then half a cosine down to `final * peak`; `progress` and `warmup` are shares of the run."""
    if progress < warmup:
        return peak * progress / warmup
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup))))
    return peak * (final + (1 - final) * cosine)
