"""`torch.nn.Linear` through the `linear` operator."""

from torch import Tensor, nn

from stellar_fast.ops.linear import Gelu, linear


class Linear(nn.Linear):
    """An ordinary `nn.Linear` whose product takes the fastest library of the device; `gelu` as in the operator."""

    def forward(self, input: Tensor, gelu: Gelu = None) -> Tensor:
        return linear(input, self.weight, self.bias, gelu=gelu)
