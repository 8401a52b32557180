"""The one door of each operator: arguments are checked here, then the chosen backend computes."""

from stellar_fast.ops import flops
from stellar_fast.ops.add_layer_norm import add_layer_norm
from stellar_fast.ops.conv3x3 import conv3x3
from stellar_fast.ops.crop_resize import crop_resize
from stellar_fast.ops.group_norm_silu import group_norm_silu
from stellar_fast.ops.koleo import koleo
from stellar_fast.ops.linear import linear
from stellar_fast.ops.lowrank_product import lowrank_product
from stellar_fast.ops.nearest_code import nearest_code
from stellar_fast.ops.packed_patch_embed import packed_patch_embed
from stellar_fast.ops.patch_unembed import patch_unembed
from stellar_fast.ops.prototype_cross_entropy import prototype_cross_entropy
from stellar_fast.ops.sinkhorn import SinkhornTargets, sinkhorn_knopp, sinkhorn_potentials
from stellar_fast.ops.token_attention import token_attention, token_self_attention
from stellar_fast.ops.token_match import token_match
from stellar_fast.ops.upsample_conv2x import upsample_conv2x

__all__ = [
    "SinkhornTargets",
    "add_layer_norm",
    "conv3x3",
    "crop_resize",
    "group_norm_silu",
    "koleo",
    "linear",
    "lowrank_product",
    "nearest_code",
    "packed_patch_embed",
    "patch_unembed",
    "prototype_cross_entropy",
    "sinkhorn_knopp",
    "sinkhorn_potentials",
    "token_attention",
    "token_match",
    "token_self_attention",
    "upsample_conv2x",
]

flops.register()
