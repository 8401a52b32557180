"""STELLAR written the plain way: what every speed-up in this project is measured against.

The same mathematics as `stellar_fast`, in ordinary torch modules: one pass per kind of view, separate query/key/value
projections, `F.scaled_dot_product_attention`, all patches of a masked view embedded before most are dropped, all
prototype logits written out. Nothing here is slow on purpose and nothing here is tuned. It imports torch alone, carries
upstream's state-dict names, and passes the golden tensors by itself (`tests/benchmarks/test_plain.py`).

It is frozen: a change here would move every published ratio.
"""

from benchmarks.plain.model import PlainStellar
from benchmarks.plain.vqgan import PlainVQGAN

__all__ = ["PlainStellar", "PlainVQGAN"]
