"""torch's linear and GELU, by the library that torch chooses.

`python -m benchmarks.ops.linear [--dtype bf16] [--rows 2170,8680] [--widths 768x3072]` prints the rate of every call
that could compute each of the three products: the numbers behind `kernels/linear/config.py`.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import measure
from benchmarks.measure import DTYPES, interleave, set_allocator, summarise, wall_ms
from stellar_fast.kernels.linear import config

WIDTHS = ((768, 2304), (768, 768), (768, 3072), (3072, 768), (512, 1536), (512, 2048), (2048, 512))


def plain(x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: str | None = None) -> Tensor:
    out = F.linear(F.gelu(x) if gelu == "input" else x, weight, bias)
    return F.gelu(out) if gelu == "output" else out


PROVIDERS = {"plain": plain}


def main() -> None:
    from stellar_fast.ops.linear import product

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--allocator", choices=("default", "raised"), default="default")
    parser.add_argument(
        "--widths", type=lambda text: [tuple(map(int, pair.split("x"))) for pair in text.split(",")], default=WIDTHS
    )
    parser.add_argument("--rows", type=lambda text: [int(n) for n in text.split(",")], default=[2170])
    options = parser.parse_args()
    set_allocator(options.allocator)
    dtype = DTYPES[options.dtype]
    print(f"GFLOP/s, {options.dtype}, allocator {options.allocator}, torch {torch.__version__}")
    print(f"{measure.cpu_name()}, {torch.get_num_threads()} threads; * is what the operator takes")
    for rows in options.rows:
        for width, out in options.widths:
            x, weight, bias, grad = (
                torch.randn(*n).to(dtype) for n in ((rows, width), (out, width), (out,), (rows, out))
            )
            arguments = {"forward": (x, weight, bias), "grad_input": (grad, weight), "grad_weight": (grad, x)}
            for direction, tensors in arguments.items():
                ways = dict.fromkeys([*config.candidates(direction, dtype), config.Product("matmul")])
                calls = {way.name: lambda way=way, d=direction, t=tensors: product(d, way, *t) for way in ways}
                for call in calls.values():
                    call()
                ms = {name: summarise(times).median for name, times in interleave(calls, wall_ms, 7, 0).items()}
                chosen = config.heuristic(direction, dtype, rows, width, out)
                rates = "  ".join(
                    f"{'*' if name == chosen.name else ''}{name} {2e-6 * rows * width * out / t:.0f}"
                    for name, t in ms.items()
                )
                print(f"{rows:6} {width:5} -> {out:5}  {direction:12} {rates}")


if __name__ == "__main__":
    main()
