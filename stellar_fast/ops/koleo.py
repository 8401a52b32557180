"""koleo: Kozachenko-Leonenko spread of the tokens within an image."""

from torch import Tensor

from stellar_fast import backend
from stellar_fast.kernels.koleo import reference
from stellar_fast.ops.checks import check_floating, check_shapes


def koleo(x: Tensor, *, min_distance: float = 0.0) -> Tensor:
    """KoLeo loss within each image's K tokens: minus the mean log distance to the nearest other token.

    Args:
        x: (N, K, D) floating, K >= 2; normalised inside.
        min_distance: floor of the distance between normalised tokens. At the exact default 0 the gradient of
            near-identical tokens reaches 1e7; below a floor > 0 the gradient is zero and the loss bounded.

    Returns:
        0-dim fp32 loss.

    Raises:
        ValueError: not three dimensions, no images, fewer than two tokens, an integer tensor, a negative floor.

    Source: "Spreading vectors for similarity search" (arXiv 1806.03198); within the image: STELLAR (arXiv 2602.01905).
    """
    backend.pick("koleo", x.device.type)
    sizes = check_shapes(x=(x, "NKD"))
    check_floating(x=x)
    if sizes["K"] < 2:
        raise ValueError(f"koleo needs at least 2 tokens an image but x has {sizes['K']}")
    if not sizes["N"]:
        raise ValueError("x has 0 images: the mean over none is not defined")
    if min_distance < 0:
        raise ValueError(f"min_distance must be at least 0 but is {min_distance}")
    return reference.koleo(x, min_distance)
