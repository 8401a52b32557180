"""`torch.nn.LayerNorm` of a residual sum through the `add_layer_norm` operator."""

from torch import Tensor, nn

from stellar_fast.ops.add_layer_norm import add_layer_norm
from stellar_fast.ops.checks import autocast_dtype


class AddLayerNorm(nn.LayerNorm):
    """A LayerNorm over one dimension that takes the residual stream and the branch to add to it."""

    def forward(self, stream: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return (stream + branch in the stream's dtype, its norm in the dtype that products run in)."""
        x, residual = (stream, None) if branch is None else (branch, stream)
        return add_layer_norm(x, residual, self.weight, self.bias, self.eps, dtype=autocast_dtype(stream.device))


def add_norm(norm: nn.Module, stream: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
    """What an AddLayerNorm returns, of a norm of one tensor too that somebody put in its place or around it."""
    if isinstance(norm, AddLayerNorm):
        return norm(stream, branch)
    stream = stream if branch is None else stream + branch
    normed = norm(stream)
    return (stream, normed) if isinstance(normed, Tensor) else normed
