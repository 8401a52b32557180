"""The one door of each operator: arguments are checked here, then the chosen backend computes."""

from stellar_fast.ops.crop_resize import crop_resize
from stellar_fast.ops.koleo import koleo
from stellar_fast.ops.linear import linear
from stellar_fast.ops.lowrank_product import lowrank_product
from stellar_fast.ops.nearest_code import nearest_code
from stellar_fast.ops.prototype_cross_entropy import prototype_cross_entropy
from stellar_fast.ops.sinkhorn import sinkhorn_knopp
from stellar_fast.ops.token_match import token_match

__all__ = [
    "crop_resize",
    "koleo",
    "linear",
    "lowrank_product",
    "nearest_code",
    "prototype_cross_entropy",
    "sinkhorn_knopp",
    "token_match",
]
