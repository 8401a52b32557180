"""`torch.nn.Conv2d`, with what the `conv3x3` operator and oneDNN can do for frozen weights on a CPU."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from stellar_fast import backend
from stellar_fast.ops.checks import autocast_dtype
from stellar_fast.ops.conv3x3 import conv3x3, pays


class _Packed(NamedTuple):
    """Weights in oneDNN's layout, and what they were made from."""

    weight: Tensor
    bias: Tensor | None
    source: tuple[object, ...]


class Conv2d(nn.Conv2d):
    """An ordinary Conv2d, faster on a CPU where its weights are frozen and no gradient is kept.

    In fp32 `conv3x3` takes it where fewer products pay. For oneDNN the weights are kept cast and laid out, which torch
    does at every call: the copy is made at the first one, again when the weights have changed, and does not belong to
    the module's state.
    """

    _packed: _Packed | None = None

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
            stream = stream.contiguous(memory_format=torch.channels_last)
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
            and not self._keeps_gradient(x)
            and not torch.compiler.is_compiling()
            and pays(x, weight)
            and backend.pick("conv3x3", "cpu") == "cpu"
        )

    def _keeps_gradient(self, x: Tensor) -> bool:
        return torch.is_grad_enabled() and any(t.requires_grad for t in (x, *self.parameters()))

    def _pack(self, x: Tensor) -> _Packed | None:
        """The weights for oneDNN, None where torch's convolution has to take the call."""
        dtype = autocast_dtype(x.device) or x.dtype
        weight, bias = self.weight, self.bias
        if torch.compiler.is_compiling():
            return None
        if (
            x.device.type != "cpu"
            or dtype not in (torch.float32, torch.bfloat16)
            or self._keeps_gradient(x)
            or weight.is_inference()  # nothing tells when it changes
            or not torch.backends.mkldnn.is_available()
            or not torch.backends.mkldnn.enabled
            or (dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported())
            or not x.numel()
            or isinstance(self.padding, str)
            or self.padding_mode != "zeros"
        ):
            return None
        source = (dtype, weight.data_ptr(), weight._version, None if bias is None else (bias.data_ptr(), bias._version))
        if self._packed is None or self._packed.source != source:
            with torch.autocast("cpu", enabled=False):
                laid_out = torch.ops.mkldnn._reorder_convolution_weight(
                    weight.detach().to(dtype), *self._geometry(), list(x.shape)
                )
                cast_bias = None if bias is None else bias.detach().to(dtype)
            self._packed = _Packed(laid_out, cast_bias, source)
        return self._packed

    def _geometry(self) -> tuple[tuple, tuple, tuple, int]:
        return self.padding, self.stride, self.dilation, self.groups  # type: ignore[return-value]

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self._packed = None  # FSDP fills its weights anew without a trace
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}
