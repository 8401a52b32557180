"""`torch.nn.ConvTranspose2d` with stride = kernel through the `patch_unembed` operator."""

from torch import Tensor, nn

from stellar_fast.ops.patch_unembed import patch_unembed


class PatchUnembed(nn.ConvTranspose2d):
    """Tokens to pixels, with the parameters of an ordinary `nn.ConvTranspose2d` whose patches do not overlap."""

    def __init__(self, embed_dim: int, out_channels: int, patch_size: int) -> None:
        super().__init__(embed_dim, out_channels, patch_size, patch_size)

    def forward(self, input: Tensor, grid: tuple[int, int]) -> Tensor:  # type: ignore[override]
        """(B, P, embed_dim) to (B, out_channels, height, width); `grid` is patches in height and width."""
        return patch_unembed(input, self.weight, self.bias, self.kernel_size[0], grid)
