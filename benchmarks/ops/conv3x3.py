"""torch's convolution of channels-last images, and oneDNN's with the weight laid out once.

`python -m benchmarks.ops.conv3x3 [--allocator raised] [--shapes vqgan_64,...]` times this package's operator,
statistics included, against both without statistics; run.py's `plain` has them, as every provider there. A shape may
be written as BxCxOxHxW.
"""

import argparse
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import measure
from benchmarks.measure import interleave, set_allocator, summarise, wall_ms
from stellar_fast.backend import use_backend
from stellar_fast.kernels.common.statistics import statistics
from stellar_fast.kernels.conv3x3.spec import SPEC
from stellar_fast.ops import conv3x3
from stellar_fast.registry import Shape

_ONES = (1, 1)


def plain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    stats_groups: int | None = None,
):
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    out = F.conv2d(x, weight, bias, padding=1)
    out = out if residual is None else out + residual
    return out if stats_groups is None else (out, statistics(out, stats_groups))


PROVIDERS = {"plain": plain}


def _shape(name: str) -> Shape:
    if name in SPEC.shapes:
        return SPEC.shapes[name]
    B, C, O, H, W = map(int, name.split("x"))  # noqa: E741
    return {"B": B, "C": C, "O": O, "H": H, "W": W, "G": 0, "R": 0}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--allocator", choices=("default", "raised"), default="default")
    parser.add_argument("--shapes", type=lambda text: text.split(","), default=["vqgan_256", "vqgan_64"])
    parser.add_argument("--seconds", type=float, default=10.0, help="for each shape")
    options = parser.parse_args()
    set_allocator(options.allocator)
    print(f"fp32, allocator {options.allocator}, torch {torch.__version__}")
    print(
        f"{measure.cpu_name()}, {torch.get_num_threads()} threads; ratio of medians (20th to 80th percentile of rounds)"
    )
    for name in options.shapes:
        shape = _shape(name)
        inputs = SPEC.make_inputs(shape, torch.float32, torch.device("cpu"), torch.Generator().manual_seed(0))
        x, weight, bias = (inputs[key] for key in ("x", "weight", "bias"))
        images = itertools.cycle([x, x.flip(0), x.flip(1), -x])
        channels_last = weight.contiguous(memory_format=torch.channels_last)
        packed = torch.ops.mkldnn._reorder_convolution_weight(weight, _ONES, _ONES, _ONES, 1, list(x.shape))
        calls = {
            "plain": lambda i=images, w=channels_last, b=bias: F.conv2d(next(i), w, b, padding=1),
            "packed": lambda i=images, w=packed, b=bias: torch.ops.mkldnn._convolution_pointwise(
                next(i), w, b, _ONES, _ONES, _ONES, 1, "none", [], ""
            ),
            "stellar_fast": lambda i=images, w=weight, b=bias, g=shape["G"] or None: conv3x3(
                next(i), w, b, stats_groups=g
            ),
        }
        with use_backend(conv3x3="cpu"):
            exact = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
            errors = [
                ((f - exact).norm() / exact.norm()).item() for f in (conv3x3(x, weight, bias), plain(x, weight, bias))
            ]
            for call in calls.values():
                call()
            samples = interleave(calls, wall_ms, None, options.seconds)
        print(f"{name}: {len(samples['plain'])} rounds, relative error {errors[0]:.1e} where torch has {errors[1]:.1e}")
        for provider, times in samples.items():
            ms = summarise(times).median
            ratios = [measure.ratio(samples[base], times) for base in ("plain", "packed")]
            text = "  ".join(f"{r.median:.2f}x ({r.p20:.2f} to {r.p80:.2f})" for r in ratios)
            rate = SPEC.flops(shape) / ms / 1e6
            print(f"  {provider:12} {ms:7.2f} ms  {rate:5.0f} GFLOP/s   over plain, packed: {text}")


if __name__ == "__main__":
    main()
