"""How the cost of this package's model grows: with the batch, sparse tokens, the image, prototypes and threads.

Each point is a case of its own, with this package alone: encode, step and objective have verified it. `exponents`
fits time ~ x^e over all points of a series, in logarithms. FLOPs alone would give 1 for the batch, about 0 for the
tokens (16 of 213), a little over 2 for the image's side, and -1 for the threads.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from benchmarks.measure import Call
from benchmarks.model import encode, objective, step
from benchmarks.model.pair import Case, build_plain, build_stellar_fast
from benchmarks.results import Row
from benchmarks.shapes import ModelShape, encode_flops, head_flops, step_flops

# where a row's shape has what grows; the other series have a column of their own
IN_SHAPE = {"sparse tokens": r"K=(\d+)", "image side": r"(\d+)px", "prototypes": r"C=(\d+)"}


@dataclass(frozen=True)
class Point:
    """One measurement to take: `x` is what grows, `call` builds what is timed."""

    series: str
    x: int
    shape: ModelShape
    batch: int
    flops: float
    call: Callable[[], Call]
    threads: int | None = None

    def build(self) -> list[Case]:
        return [
            Case(
                suite="scaling",
                direction=self.series,
                preset=self.shape.preset,
                shape=self.shape.describe(self.batch, step=not self.series.startswith("encode")),
                batch=self.batch,
                flops=self.flops,
                bytes=0,
                calls={"stellar_fast": self.call()},
                checks={},
                threads=self.threads,
            )
        ]


def points(shape: ModelShape, dtype: torch.dtype, device: torch.device) -> Iterator[Point]:
    """All points, series by series."""

    def encoding(series: str, x: int, shape: ModelShape, batch: int, threads: int | None = None) -> Point:
        def call() -> Call:
            model = build_stellar_fast(shape, build_plain(shape, device)).eval()
            return encode.encode_call(model, shape, batch, dtype, device)

        return Point(f"encode, {series}", x, shape, batch, encode_flops(shape, batch), call, threads)

    def stepping(series: str, x: int, batch: int, threads: int | None = None) -> Point:
        def call() -> Call:
            model = build_stellar_fast(shape, build_plain(shape, device)).train()
            return step.training_step(model, step.step_forward(shape, batch, device), dtype)

        return Point(f"step, {series}", x, shape, batch, step_flops(shape, batch), call, threads)

    def learning(series: str, x: int, shape: ModelShape, batch: int) -> Point:
        def call() -> Call:
            return objective.forward_backward("stellar_fast", shape, batch, dtype, device)[0]

        flops = 3 * head_flops(shape, objective.num_tokens(shape, batch))
        return Point(f"objective, {series}", x, shape, batch, flops, call)

    for batch in (1, 2, 4, 8, 16, 32, 64):
        yield encoding("batch", batch, shape, batch)
    for batch in (1, 2, 4, 8):
        yield stepping("batch", batch, batch)
    for tokens in (8, 16, 32, 64):
        yield encoding("sparse tokens", tokens, replace(shape, num_sparse_tokens=tokens), 4)
    for scale in (1, 1.5, 2, 2.5):  # 224 to 560 pixels
        side = int(shape.image_size * scale)
        config = replace(shape.encoder, image_size=side - side % shape.encoder.patch_size)
        yield encoding("image side", config.image_size, replace(shape, encoder=config), 2)
    for batch in (2, 4, 8, 16, 32, 64):
        yield learning("batch", batch, shape, batch)
    for clusters in (1024, 4096, 16384, 65536, 131072):
        yield learning("prototypes", clusters, replace(shape, num_clusters=clusters), 4)
    if device.type == "cpu":
        available = torch.get_num_threads()
        for threads in sorted({*(1 << i for i in range(available.bit_length())), available}):
            if threads <= available:
                yield encoding("threads", threads, shape, 8, threads)
                yield stepping("threads", threads, 2, threads)


def grown(row: Row) -> int:
    """What grows along the series of a row."""
    what = row.direction.split(", ")[1]
    if what in IN_SHAPE:
        found = re.search(IN_SHAPE[what], row.shape)
        return int(found[1]) if found else 0
    return row.threads if what == "threads" else row.batch


def exponents(rows: Sequence[Row]) -> dict[tuple[str, str], float]:
    """e of time ~ x^e by series and dtype, where a series has two points or more."""
    fits = {}
    for series in dict.fromkeys((row.direction, row.dtype) for row in rows if row.suite == "scaling"):
        of_series = [row for row in rows if row.suite == "scaling" and (row.direction, row.dtype) == series]
        x, time_ms = [grown(row) for row in of_series], [row.median_ms for row in of_series]
        if len(set(x)) > 1:
            fits[series] = float(np.polyfit(np.log(x), np.log(time_ms), 1)[0])
    return fits
