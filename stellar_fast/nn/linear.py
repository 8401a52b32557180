"""`torch.nn.Linear` through the `linear` operator."""

import torch.nn.functional as F
from torch import Tensor, nn

from stellar_fast.nn.plain import is_plain, wraps_tensors
from stellar_fast.ops.linear import Gelu, linear


class Linear(nn.Linear):
    """An ordinary `nn.Linear` whose product takes the fastest library of the device; `gelu` as in the operator."""

    def forward(self, input: Tensor, gelu: Gelu = None) -> Tensor:
        if wraps_tensors(self.weight):  # sharded or quantised: such a tensor knows torch's operators alone
            out = F.linear(F.gelu(input) if gelu == "input" else input, self.weight, self.bias)
            return F.gelu(out) if gelu == "output" else out
        return linear(input, self.weight, self.bias, gelu=gelu)


def gelu_of_linear(layer: nn.Module, x: Tensor) -> Tensor:
    """gelu(layer(x)), exact; of a Linear that somebody wrapped or replaced too."""
    return layer(x, gelu="output") if is_plain(layer, Linear) else F.gelu(layer(x))


def linear_of_gelu(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(gelu(x)), exact. A plain Linear keeps x for the backward, and not gelu(x)."""
    return layer(x, gelu="input") if is_plain(layer, Linear) else layer(F.gelu(x))
