"""Which call computes each of linear's three products on a CPU, by measured rates.

T rows, I input width, O output width. GFLOP/s on 2 cores of an AMD EPYC (Zen 5, AVX-512), torch 2.13, allocator raised;
the clock of that machine drifts by a tenth between runs, so compare within a column. On another machine
`stellar-fast tune linear` measures the same calls.

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

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

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


@dataclass(frozen=True)
class Config:
    """x W^T, dy W and dy^T x."""

    forward: Product
    grad_input: Product
    grad_weight: Product


def heuristic(shape: Mapping[str, int], dtype: torch.dtype, device: torch.device | str) -> Config:
    """The fastest of `candidates` at the sizes of a ViT; see the head of this file."""
    return Config(Product("pointwise"), _grad_input(shape, dtype), _grad_weight(shape, dtype))


def _grad_input(shape: Mapping[str, int], dtype: torch.dtype) -> Product:
    T, I, O = (shape[letter] for letter in "TIO")  # noqa: E741
    wide = O > I and I * O >= 3 << 19  # a weight that outweighs its copy, over
    pays = dtype == torch.float32 and wide and T >= 768  # enough rows
    return Product("transposed" if pays else "pointwise")


def _grad_weight(shape: Mapping[str, int], dtype: torch.dtype) -> Product:
    T, I, O = (shape[letter] for letter in "TIO")  # noqa: E741
    if dtype != torch.float32:
        return Product("half_transposed" if I > O else "matmul")
    if I > O and T < 1024:
        return Product("pointwise")
    return Product("transposed", 2560)  # copies of more rows fall out of the caches


def candidates(shape: Mapping[str, int], dtype: torch.dtype) -> Iterator[Config]:
    """The heuristic's, then others of one product alone: their times do not interact."""
    start = heuristic(shape, dtype, "cpu")
    found = [start]
    for name in ("forward", "grad_input", "grad_weight"):
        found += [replace(start, **{name: product}) for product in products(name, dtype)]
    yield from dict.fromkeys(found)


def products(name: str, dtype: torch.dtype) -> list[Product]:
    """Everything that oneDNN can take for one of the three; torch's own product is its in bf16 alone."""
    half = dtype != torch.float32
    if name == "forward":
        found = [Product("pointwise")]
    elif name == "grad_input":
        found = [Product("pointwise"), Product("transposed")]
    else:
        found = [Product("pointwise"), Product("pointwise", 1024), Product("transposed"), Product("transposed", 2560)]
        found += [Product("half_transposed")] if half else [Product("inner_product"), Product("inner_product", 2560)]
    return [*found, Product("matmul")] if half else found


def is_valid(config: Config, shape: Mapping[str, int], dtype: torch.dtype) -> bool:
    """Whether each product can be computed so."""
    return all(getattr(config, name) in products(name, dtype) for name in ("forward", "grad_input", "grad_weight"))
