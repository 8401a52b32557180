"""`torch.nn.Conv2d`, with what the `conv3x3` operator and oneDNN can do for frozen weights on a CPU."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from stellar_fast import backend
from stellar_fast.ops.checks import autocast_dtype, channels_last, is_looked_on
from stellar_fast.ops.conv3x3 import conv3x3, pays
from stellar_fast.ops.from_weight import from_weight

TYPICAL_SIDE = 64  # of the images that weights are laid out for; others take the same layout


class _Packed(NamedTuple):
    """What oneDNN reads: the weights in its own layout."""

    weight: Tensor
    bias: Tensor | None


class Conv2d(nn.Conv2d):
    """An ordinary Conv2d, faster on a CPU where its weights are frozen and no gradient is kept.

    In fp32 `conv3x3` takes it where fewer products pay. For oneDNN the weights are kept cast and laid out, which torch
    does at every call (`stellar_fast.ops.from_weight`).
    """

    def forward(self, input: Tensor) -> Tensor:
        if self._has_fewer_products(input):
            return conv3x3(input, self.weight, self.bias)
        packed = self._pack(input)
        if packed is None:
            return super().forward(input)
        return torch.ops.mkldnn._convolution_pointwise(
            input.to(packed.weight.dtype), packed.weight, packed.bias, *self._geometry(), "none", [], ""
        )

    def with_stats(self, x: Tensor, groups: int) -> tuple[Tensor, Tensor | None]:
        """conv(x), and its statistics for a GroupNorm where they come at no cost."""
        if self._has_fewer_products(x):
            return conv3x3(x, self.weight, self.bias, stats_groups=groups)
        return self(x), None

    def add(self, x: Tensor, stream: Tensor, groups: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Two terms of conv(x) + stream, or the sum and None; and its statistics as above.

        May overwrite `stream` where no gradient is kept. On a CPU the sum is formed in its memory, while it is
        convolved. Elsewhere it is left to who normalises it, in one pass with its statistics.
        """
        keeps = torch.is_grad_enabled() and stream.requires_grad
        if self._has_fewer_products(x) and stream.dtype == torch.float32 and not keeps:
            stream = channels_last(stream)
            arguments = x, self.weight, self.bias
            out, stats = conv3x3(*arguments, residual=stream, stats_groups=groups, out=stream)
            return out, None, stats
        packed = self._pack(x)
        if packed is None or not packed.weight.dtype == x.dtype == stream.dtype or stream.requires_grad:
            return self(x), stream, None
        torch.ops.mkldnn._convolution_pointwise_.binary(
            stream, x, packed.weight, packed.bias, *self._geometry(), "add", None, None, [], None
        )
        return stream, None, None

    def _has_fewer_products(self, x: Tensor) -> bool:
        """Whether the operator's own kernel takes the call, and no gradient is kept."""
        weight, ones = self.weight, (1, 1)
        return (
            x.device.type == "cpu"
            and (autocast_dtype(x.device) or x.dtype) == weight.dtype == torch.float32
            and self.kernel_size == (3, 3)
            and self.padding == self.stride == self.dilation == ones
            and self.groups == 1
            and self.padding_mode == "zeros"
            and not is_looked_on(x, weight, self.bias)
            and not self._keeps_gradient(x)
            and pays(x, weight)
            and backend.pick("conv3x3", "cpu") == "cpu"
        )

    def _keeps_gradient(self, x: Tensor) -> bool:
        return torch.is_grad_enabled() and any(t.requires_grad for t in (x, *self.parameters()))

    def _pack(self, x: Tensor) -> _Packed | None:
        """The weights for oneDNN, None where torch's convolution has to take the call."""
        weight, dtype = self.weight, autocast_dtype(x.device) or x.dtype
        if (
            x.device.type != "cpu"
            or dtype not in (torch.float32, torch.bfloat16)
            or is_looked_on(x, weight, self.bias)
            or self._keeps_gradient(x)
            or not torch.backends.mkldnn.is_available()
            or not torch.backends.mkldnn.enabled
            or (dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported())
            or not x.numel()
            or isinstance(self.padding, str)
            or self.padding_mode != "zeros"
        ):
            return None
        with torch.autocast("cpu", enabled=False):
            laid_out = from_weight(_laid_out, weight, dtype, dtype, *self._geometry())
        return _Packed(laid_out, None if self.bias is None else self.bias.detach().to(dtype))

    def _geometry(self) -> tuple[tuple, tuple, tuple, int]:
        return self.padding, self.stride, self.dilation, self.groups  # type: ignore[return-value]


def _laid_out(
    weight: Tensor, dtype: torch.dtype, padding: tuple, stride: tuple, dilation: tuple, groups: int
) -> Tensor:
    sides = (TYPICAL_SIDE + d * k for d, k in zip(dilation, weight.shape[2:], strict=True))
    size = [1, weight.shape[1] * groups, *sides]
    return torch.ops.mkldnn._reorder_convolution_weight(weight.to(dtype), padding, stride, dilation, groups, size)
