"""Transformed taps from a 3x3 weight. O output channels, C input channels."""

import torch
import torch.nn.functional as F
from torch import Tensor

PANEL, COLUMNS = 64, 16  # kConvPanel and kConvColumns of csrc/conv3x3


def winograd_weights(weight_OC33: Tensor) -> Tensor:
    """What `conv3x3` of csrc reads: panels of 64 output channels, each (16, C, channels), in one row.

    Of the output channels there are zeros up to a multiple of 16. Summed in fp64, and rounded once.
    """
    O = weight_OC33.shape[0]  # noqa: E741
    taps_33CO = F.pad(weight_OC33.double().permute(2, 3, 1, 0), (0, -O % COLUMNS)).contiguous()
    for dim in (0, 1):
        first, middle, last = taps_33CO.unbind(dim)
        outer = (first + last) / 2
        taps_33CO = torch.stack((first, outer + middle / 2, outer - middle / 2, last), dim)
    taps = taps_33CO.flatten(0, 1).to(weight_OC33.dtype)
    return torch.cat([panel.flatten() for panel in taps.split(PANEL, dim=2)])
