"""How the cost of this package's model grows: with the batch, the sparse tokens, the image and the prototypes.

Each series is a table of medians and the exponent e of time ~ x^e, fitted over all its points in logarithms. FLOPs
alone would give 1 for the batch, about 0 for the tokens (16 of 213) and a little over 2 for the image's side.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from benchmarks.measure import Call, Summary, Timer, summarise
from benchmarks.model import encode, objective, step
from benchmarks.model.pair import build_plain, build_stellar_fast
from benchmarks.shapes import ModelShape, encode_flops, head_flops, step_flops


@dataclass(frozen=True)
class Point:
    """One measurement to take: `x` is what grows, `build` gives the call."""

    series: str
    x: int
    shape: ModelShape
    batch: int
    flops: float
    build: Callable[[], Call]


def points(shape: ModelShape, dtype: torch.dtype, device: torch.device) -> Iterator[Point]:
    """All points, series by series."""

    def encoding(series: str, x: int, shape: ModelShape, batch: int) -> Point:
        def build() -> Call:
            model = build_stellar_fast(shape, build_plain(shape, device)).eval()
            return encode.encode_call(model, shape, batch, dtype, device)

        return Point(series, x, shape, batch, encode_flops(shape, batch), build)

    def stepping(batch: int) -> Point:
        def build() -> Call:
            model = build_stellar_fast(shape, build_plain(shape, device)).train()
            return step.training_step(model, step.step_forward(shape, batch, device), dtype)

        return Point("step, batch", batch, shape, batch, step_flops(shape, batch), build)

    def learning(series: str, x: int, shape: ModelShape, batch: int) -> Point:
        def build() -> Call:
            return objective.forward_backward("stellar_fast", shape, batch, dtype, device)[0]

        return Point(series, x, shape, batch, 3 * head_flops(shape, objective.num_tokens(shape, batch)), build)

    for batch in (1, 2, 4, 8, 16, 32, 64):
        yield encoding("encode, batch", batch, shape, batch)
    for batch in (1, 2, 4, 8):
        yield stepping(batch)
    for tokens in (8, 16, 32, 64):
        yield encoding("encode, sparse tokens", tokens, replace(shape, num_sparse_tokens=tokens), 4)
    for side in (224, 320, 416, 512):
        config = replace(shape.encoder, image_size=side)
        yield encoding("encode, image side", side, replace(shape, encoder=config), 2)
    for batch in (2, 4, 8, 16, 32, 64):
        yield learning("objective, batch", batch, shape, batch)
    for clusters in (1024, 4096, 16384, 65536, 131072):
        yield learning("objective, prototypes", clusters, replace(shape, num_clusters=clusters), 4)


def measure_all(
    shape: ModelShape,
    dtype: torch.dtype,
    device: torch.device,
    rounds: int,
    timer: Timer,
    say: Callable[[str], object],
) -> list[tuple[Point, Summary]]:
    """Time every point, a model at a time: the median of `rounds` calls after one to warm up."""
    found = []
    for point in points(shape, dtype, device):
        say(f"scaling: {point.series} {point.x}")
        call = point.build()
        call()
        found.append((point, summarise([timer(call) for _ in range(rounds)])))
    return found


def exponent(x: list[int], time_ms: list[float]) -> float:
    """e of time ~ x^e by least squares in logarithms."""
    return float(np.polyfit(np.log(x), np.log(time_ms), 1)[0])
