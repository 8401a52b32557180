"""Taps of the four phases and of the nine products, from a 3x3 weight. O output channels, C input channels.

Phase (a, b) is the output pixels of odd (a = 1) or even rows, odd or even columns. Taps come first while they are added
up, so that sums are those of whole matrices: each step of training makes them anew.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

PANEL, COLUMNS = 64, 16  # kUpsamplePanel and kUpsampleColumns of csrc/upsample_conv2x


def phase_weights(weight_OC33: Tensor) -> Tensor:
    """The (4 O, C, 2, 2) weight, channels_last, of one convolution with padding 1: O channels of each phase in turn.

    Phases go (0, 0), (0, 1), (1, 0), (1, 1). The output has a row and a column more than the image; phase (a, b) is
    read from row a and column b on.
    """
    taps_33OC = weight_OC33.permute(2, 3, 0, 1).contiguous()
    phases = _phases(_phases(taps_33OC, 0), 2)  # a, tap of it, b, tap of it, O, C
    return phases.permute(0, 2, 4, 1, 3, 5).flatten(0, 2).permute(0, 3, 1, 2)


def _phases(taps: Tensor, dim: int) -> Tensor:
    """The three taps of one dimension as even or odd, by two taps each."""
    first, middle, last = taps.unbind(dim)
    even, odd = torch.stack((first, middle + last), dim), torch.stack((first + middle, last), dim)
    return torch.stack((even, odd), dim)


def fold_phases(grad_4OC22: Tensor) -> Tensor:
    """The gradient (O, C, 3, 3) of the weight, from that of `phase_weights`."""
    phases = grad_4OC22.unflatten(0, (2, 2, -1)).permute(0, 4, 1, 5, 2, 3)  # as above
    return _fold(_fold(phases, 0), 1).permute(2, 3, 0, 1).contiguous()


def _fold(grad: Tensor, dim: int) -> Tensor:
    (even_first, even_rest), (odd_rest, odd_last) = (phase.unbind(dim) for phase in grad.unbind(dim))
    return torch.stack((even_first + odd_rest, even_rest + odd_rest, even_rest + odd_last), dim)


def product_weights(weight_OC33: Tensor) -> Tensor:
    """What `upsample_conv2x_products` reads: panels of 64 output channels, each (9, C, channels), in one row.

    Of the output channels there are zeros up to a multiple of 16.
    """
    return _product_panels(weight_OC33, 1)


def paired_product_weights(weight_OC33: Tensor) -> Tensor:
    """The same for bfloat16, panels of (9, C / 2, channels, 2): two input channels are multiplied in one step."""
    return _product_panels(weight_OC33, 2)


def _product_panels(weight_OC33: Tensor, together: int) -> Tensor:
    O, C = weight_OC33.shape[:2]  # noqa: E741
    taps_33CO = F.pad(weight_OC33.permute(2, 3, 1, 0), (0, -O % COLUMNS, 0, -C % together)).contiguous()
    for dim in (0, 1):
        first, middle, last = taps_33CO.unbind(dim)
        taps_33CO = torch.stack((first + middle + last, -first, last), dim)
    steps = taps_33CO.flatten(0, 1).unflatten(1, (-1, together)).transpose(2, 3)
    return torch.cat([panel.flatten() for panel in steps.split(PANEL, dim=2)])
