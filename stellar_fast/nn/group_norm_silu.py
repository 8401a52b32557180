"""`torch.nn.GroupNorm` and a SiLU through the `group_norm_silu` operator."""

import torch
from torch import Tensor, nn

from stellar_fast.ops.checks import is_looked_on
from stellar_fast.ops.group_norm_silu import group_norm_silu
from stellar_fast.ops.scratch import scratch


class GroupNormSiLU(nn.GroupNorm):
    """A GroupNorm followed by a SiLU, with GroupNorm's parameters."""

    def forward(  # type: ignore[override]
        self, x: Tensor, addend: Tensor | None = None, stats: Tensor | None = None, *, transient: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return (silu(norm(x + addend)), x + addend); `stats` are those of x, and of use without an addend.

        A transient first result is memory that the thread's next one overwrites, on a CPU where no gradient is kept:
        fresh memory costs more there than the arithmetic.
        """
        arguments = (x, self.num_groups, self.weight, self.bias, self.eps)
        tensors = (x, self.weight, self.bias) if addend is None else (x, addend, self.weight, self.bias)
        keeps = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        out = None
        if transient and x.device.type == "cpu" and x.numel() and not keeps and not is_looked_on(*tensors):
            out = scratch(x.shape, x.dtype, "group_norm_silu", torch.channels_last)
        if addend is None:
            return group_norm_silu(*arguments, stats, out=out), x
        return group_norm_silu(*arguments, residual=addend, out=out)
