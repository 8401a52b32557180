"""Which call of oneDNN computes each of linear's three products on a CPU, by measured rates.

GFLOP/s in fp32 | bf16 on 2 cores of an AMD EPYC (Zen 5, AVX-512), torch 2.13, by `python benchmarks/ops/linear.py --rates`:

    T rows, I -> O           2170, 768 -> 3072    2170, 3072 -> 768    2170, 768 -> 768    8680, 768 -> 3072
    forward     pointwise         479 | 990           478 | 975           473 | 993              | 736
                matmul            218 | 951           220 | 956           219 | 965              | 705
    grad_input  pointwise         405 | 970           455 | 967           485 | 985              | 960
                matmul            221 | 971           215 | 976           218 | 980              | 956
    grad_weight pointwise         359 | 739           354 | 840           340 | 821          254 | 523
                  in slices       389 | 722           425 | 825           369 | 797          397 | 709
                matmul            215 | 916           212 | 832           215 | 953          219 | 890
                inner_product     414 | 790           405 | 738           440 | 714          347 |
                  in slices                                                                  423 |

In fp32 matmul is torch's own path and not oneDNN's. Slices are of rows, and their results are added.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Product:
    """A call, and how much one takes.

    Attributes:
        way: pointwise is `mkldnn::_linear_pointwise`; matmul torch's own; inner_product
            `aten::mkldnn_linear_backward_weights`, which copies its operands into oneDNN's layout.
        slice_rows: most rows that one call takes, 0 for all; what the slices give is added.
    """

    way: str
    slice_rows: int = 0

    @property
    def name(self) -> str:
        return self.way + (f"/{self.slice_rows}" if self.slice_rows else "")


def heuristic(direction: str, dtype: torch.dtype, in_width: int, out_width: int) -> Product:
    """The fastest of `candidates` at the sizes of a ViT; see the head of this file."""
    if direction != "grad_weight":
        return Product("pointwise")
    if dtype != torch.float32:
        return Product("matmul")
    # The copies of inner_product pay where the gradient is the wide side, and fall out of the caches in long slices.
    return Product("inner_product", 2560) if in_width <= out_width else Product("pointwise", 1024)


def candidates(direction: str, dtype: torch.dtype) -> list[Product]:
    """Everything that oneDNN can take for a product."""
    ways = [Product("pointwise")]
    if dtype != torch.float32:
        ways.append(Product("matmul"))
    if direction == "grad_weight":
        ways += [Product("pointwise", 1024)]
        if dtype == torch.float32:  # in bf16 it wants an fp32 weight, and lost
            ways += [Product("inner_product"), Product("inner_product", 2560)]
    return ways
