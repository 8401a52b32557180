"""`torch.nn.Conv2d`, with what oneDNN can do for frozen weights on a CPU."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from stellar_fast.ops.checks import autocast_dtype


class _Packed(NamedTuple):
    """Weights in oneDNN's layout, and what they were made from."""

    weight: Tensor
    bias: Tensor | None
    source: tuple[object, ...]


class Conv2d(nn.Conv2d):
    """An ordinary Conv2d that keeps frozen weights cast and laid out as oneDNN multiplies them.

    Torch casts (under autocast) and lays them out at every call. The copy is made at the first call on a CPU where no
    gradient is kept, again when the weights have changed, and does not belong to the module's state.
    """

    _packed: _Packed | None = None

    def forward(self, input: Tensor) -> Tensor:
        packed = self._pack(input)
        if packed is None:
            return super().forward(input)
        return torch.ops.mkldnn._convolution_pointwise(
            input.to(packed.weight.dtype), packed.weight, packed.bias, *self._geometry(), "none", [], ""
        )

    def add(self, x: Tensor, stream: Tensor) -> tuple[Tensor, Tensor | None]:
        """Two terms of conv(x) + stream, or the sum and None. May overwrite `stream` where no gradient is kept.

        On a CPU oneDNN forms the sum while it convolves, in the memory of `stream`. Elsewhere it is left to who
        normalises it, in one pass with its statistics.
        """
        packed = self._pack(x)
        if packed is None or not packed.weight.dtype == x.dtype == stream.dtype or stream.requires_grad:
            return self(x), stream
        torch.ops.mkldnn._convolution_pointwise_.binary(
            stream, x, packed.weight, packed.bias, *self._geometry(), "add", None, None, [], None
        )
        return stream, None

    def _pack(self, x: Tensor) -> _Packed | None:
        """The weights for oneDNN, None where torch's convolution has to take the call."""
        dtype = autocast_dtype(x.device) or x.dtype
        weight, bias = self.weight, self.bias
        if torch.compiler.is_compiling():
            return None
        if (
            x.device.type != "cpu"
            or dtype not in (torch.float32, torch.bfloat16)
            or (torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight)))
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
