"""Which call computes each of linear's three products on a CPU, by measured rates.

GFLOP/s on 2 cores of an AMD EPYC (Zen 5, AVX-512), torch 2.13, allocator raised, `python -m benchmarks.ops.linear`; the
clock of that machine drifts by a tenth between runs, so compare within a column.

                                    2,170 rows, fp32        2,170 rows, bf16      8,680 rows, fp32
    in -> out                     768-3072   3072-768     768-3072   3072-768         768-3072
    forward      pointwise           421        442          946        941              453
                 matmul              208        211          887        909              204
    grad_input   pointwise           397        425          919        922              398
                 transposed          428        435          904        905              456
                 matmul              213        204          912        922              214
    grad_weight  pointwise           326        331          704        807              309
                 transposed          401        407          846        813              406
                 half_transposed                             853        853
                 inner_product       400        352                                      404
                 matmul              211        203          897        815              211

In fp32 matmul is another library than oneDNN here. At 426 and 896 rows the order is the same, but for what the
thresholds below say. With glibc's default allocator 8,680 rows cost page faults: slices keep grad_weight at 401, where
one call gives 319.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Product:
    """A call, and how much one takes.

    Attributes:
        way: pointwise is `mkldnn::_linear_pointwise`, on views; transposed the same on dense copies of what the product
            takes transposed; half_transposed torch's product with such a copy of the gradient alone; inner_product
            `aten::mkldnn_linear_backward_weights`, which copies both operands; matmul torch's product.
        slice_rows: most rows that one call takes, 0 for all; what the slices give is added.
    """

    way: str
    slice_rows: int = 0

    @property
    def name(self) -> str:
        return self.way + (f"/{self.slice_rows}" if self.slice_rows else "")


def heuristic(direction: str, dtype: torch.dtype, rows: int, in_width: int, out_width: int) -> Product:
    """The fastest of `candidates` at the sizes of a ViT; see the head of this file."""
    if direction != "grad_weight":
        wide = out_width > in_width and in_width * out_width >= 3 << 19  # a weight that outweighs its copy, over
        pays = direction == "grad_input" and dtype == torch.float32 and wide and rows >= 768  # enough rows
        return Product("transposed" if pays else "pointwise")
    if dtype != torch.float32:
        return Product("half_transposed" if in_width > out_width else "matmul")
    if in_width > out_width and rows < 1024:
        return Product("pointwise")
    return Product("transposed", 2560)  # copies of more rows fall out of the caches


def candidates(direction: str, dtype: torch.dtype) -> list[Product]:
    """Everything that oneDNN can take for a product; torch's own product is its in bf16 alone."""
    half = dtype != torch.float32
    if direction == "forward":
        ways = [Product("pointwise")]
    elif direction == "grad_input":
        ways = [Product("pointwise"), Product("transposed")]
    else:
        ways = [Product("pointwise"), Product("pointwise", 1024), Product("transposed"), Product("transposed", 2560)]
        ways += [Product("half_transposed")] if half else [Product("inner_product"), Product("inner_product", 2560)]
    return [*ways, Product("matmul")] if half else ways
