"""Plain torch patch_unembed in fp32 (fp64 where given). B images, P tokens, H width, C channels, S side of a patch."""

from torch import Tensor

from stellar_fast.kernels.common.precision import at_least_fp32


def patch_unembed(
    x_BPH: Tensor, weight_HCSS: Tensor, bias_C: Tensor | None, patch_size: int, grid: tuple[int, int]
) -> Tensor:
    """Return (B, C, rows S, columns S) fp32, contiguous."""
    (rows, columns), S = grid, patch_size
    B, C = x_BPH.shape[0], weight_HCSS.shape[1]
    patches = at_least_fp32(x_BPH) @ at_least_fp32(weight_HCSS).flatten(1)
    image = patches.view(B, rows, columns, C, S, S).permute(0, 3, 1, 4, 2, 5).reshape(B, C, rows * S, columns * S)
    return image if bias_C is None else image + at_least_fp32(bias_C)[:, None, None]
