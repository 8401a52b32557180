"""torch's interpolate and convolution on channels-last images, and the same four convolutions sliced in plain Python.

`python -m benchmarks.ops.upsample_conv2x [--dtype bf16] [--allocator raised]` times this package's operator, statistics
included, against both without statistics; run.py's `plain` has them, as every provider there.
"""

import argparse
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import measure
from benchmarks.measure import DTYPES, interleave, set_allocator, summarise, wall_ms
from stellar_fast.kernels.upsample_conv2x.spec import SPEC
from stellar_fast.ops import upsample_conv2x

_CHANNELS_LAST = torch.channels_last


def plain(x: Tensor, weight: Tensor, bias: Tensor | None = None, stats_groups: int | None = None):
    return _with_statistics(_upsampled(x, weight, bias), stats_groups)


def _upsampled(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    x, weight = (t.contiguous(memory_format=_CHANNELS_LAST) for t in (x, weight))
    return F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1)


def _phase_weights(weight: Tensor) -> list[Tensor]:
    top, middle, bottom = weight.float().unbind(2)
    phases = []
    for rows in ((top, middle + bottom), (top + middle, bottom)):
        left, centre, right = torch.stack(rows, 2).unbind(3)
        phases += [torch.stack((left, centre + right), 3), torch.stack((left + centre, right), 3)]
    return [phase.to(weight.dtype).contiguous(memory_format=_CHANNELS_LAST) for phase in phases]


def _sliced(x: Tensor, phases: list[Tensor], bias: Tensor | None) -> Tensor:
    x = x.contiguous(memory_format=_CHANNELS_LAST)
    B, _, H, W = x.shape
    shape = B, phases[0].shape[0], 2 * H, 2 * W
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_CHANNELS_LAST)
    for i, phase in enumerate(phases):
        a, b = divmod(i, 2)
        out[:, :, a::2, b::2] = F.conv2d(x, phase, bias, padding=1)[:, :, a : a + H, b : b + W]
    return out


def _with_statistics(out: Tensor, groups: int | None) -> Tensor | tuple[Tensor, Tensor]:
    if groups is None:
        return out
    with torch.no_grad():
        values = out.permute(0, 2, 3, 1).unflatten(3, (groups, -1)).float()
        variance, mean = torch.var_mean(values, dim=(1, 2, 4), correction=0)
        return out, torch.stack((mean, variance), dim=2)


PROVIDERS = {"plain": plain}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--allocator", choices=("default", "raised"), default="default")
    parser.add_argument("--shapes", type=lambda text: text.split(","), default=["vqgan_128", "vqgan_64"])
    parser.add_argument("--seconds", type=float, default=10.0, help="for each shape")
    options = parser.parse_args()
    set_allocator(options.allocator)
    dtype = DTYPES[options.dtype]
    print(f"{options.dtype}, allocator {options.allocator}, torch {torch.__version__}")
    print(
        f"{measure.cpu_name()}, {torch.get_num_threads()} threads; ratio of medians (20th to 80th percentile of rounds)"
    )
    for name in options.shapes:
        shape = SPEC.shapes[name]
        inputs = SPEC.make_inputs(shape, dtype, torch.device("cpu"), torch.Generator().manual_seed(0))
        x, weight, bias = (inputs[key] for key in ("x", "weight", "bias"))
        images = itertools.cycle([x, x.flip(0), x.flip(1), -x])  # more than the caches hold
        channels_last, phases = weight.contiguous(memory_format=_CHANNELS_LAST), _phase_weights(weight)
        calls = {
            "plain": lambda i=images, w=channels_last, b=bias: _upsampled(next(i), w, b),
            "sliced": lambda i=images, p=phases, b=bias: _sliced(next(i), p, b),
            "stellar_fast": lambda i=images, w=weight, b=bias, g=shape["G"]: upsample_conv2x(
                next(i), w, b, stats_groups=g
            ),
        }
        want, found = _upsampled(x.float(), weight.float(), bias.float()), upsample_conv2x(x, weight, bias)
        error = ((found - want).norm() / want.norm()).item()
        for call in calls.values():
            call()
        samples = interleave(calls, wall_ms, None, options.seconds)
        print(f"{name}: {len(samples['plain'])} rounds, relative error {error:.1e}")
        for provider, times in samples.items():
            ms = summarise(times).median
            ratios = [measure.ratio(samples[base], times) for base in ("plain", "sliced")]
            text = "  ".join(f"{r.median:.2f}x ({r.p20:.2f} to {r.p80:.2f})" for r in ratios)
            rate = SPEC.flops(shape) / ms / 1e6
            print(f"  {provider:12} {ms:7.1f} ms  {rate:5.0f} GFLOP/s   over plain, sliced: {text}")


if __name__ == "__main__":
    main()
