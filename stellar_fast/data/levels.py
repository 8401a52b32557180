"""Numbers of more than 8 bits as 8-bit levels: one rule for every container, told in docs/data.md."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

Range = tuple[float, float]  # what becomes 0 and 255

LEFT_OUT = 1000  # one pixel in so many may lie above the range,
SMALL = 64  # and at least one of a picture that has so many pixels
SLACK = 1 + 1 / 32  # so far may a range be exceeded and is still taken
UNIT_TOP = 2.0  # floating-point numbers up to it are fractions of 1
SHOWN_SHARE = 1 / 8  # of its range that a file should use
OPTION = "--value-range LO HI (value_range=(LO, HI))"
_STRIP = 1 << 20  # values that are worked on at once in fp64


class Doubt(NamedTuple):
    """What may be wrong with how a file was read: its kind, which is told once, and a sentence about the file."""

    kind: str
    text: str


def check_range(value_range: Range | None) -> Range | None:
    """The same as floats; ValueError unless both are finite and the first is the smaller one."""
    if value_range is None:
        return None
    low, high = (float(value) for value in value_range)
    if not (np.isfinite((low, high)).all() and low < high):
        raise ValueError(f"value_range must be two finite numbers, the smaller one first, but is ({low:g}, {high:g})")
    return low, high


def to_8_bits(levels: np.ndarray, value_range: Range | None, bits: int) -> tuple[np.ndarray, list[Doubt]]:
    """Map numbers to 0 to 255: linearly, clipped, rounded to the nearest. NaN becomes 0.

    Args:
        levels: integers or floats of shape (H, W) or (H, W, channels).
        value_range: what becomes 0 and 255; None: found from the numbers.
        bits: that the file's integers may fill.

    Returns:
        The levels as uint8, and what is doubtful about them.

    Raises:
        ValueError: no value is finite, or without `value_range` most are negative.
    """
    floating = levels.dtype.kind == "f"
    finite = levels.reshape(-1)
    if floating:
        finite = finite[np.isfinite(finite)]
    if not finite.size:
        raise ValueError("none of its values is a finite number")
    outliers = _outliers(finite.size, channels=levels.size // (levels.shape[0] * levels.shape[1]))
    place = finite.size - 1 - outliers
    top = float(np.partition(finite, place)[place])
    doubts: list[Doubt] = []
    if value_range is None:
        value_range = _find_range(top, floating)
        doubts += _negative(finite, outliers)
        if not floating and 0 < top < (2**bits - 1) * SHOWN_SHARE:
            taken = round(math.log2(value_range[1] + 1))
            text = f"its values end at {top:,.0f}, within an eighth of {bits} bits, and are taken for {taken} bits"
            doubts.append(Doubt("few bits", f"{text}; {OPTION} sets one range for all files"))
    low, high = value_range
    if top != low and top < low + (high - low) * SHOWN_SHARE and not doubts:
        text = f"its values end at {top:,g}, within an eighth of the range from {low:,g} to {high:,g}"
        doubts.append(Doubt("dark", f"{text}; {OPTION} sets another"))
    if levels.dtype in (np.uint8, np.uint16):
        return _scaled(np.arange(np.iinfo(levels.dtype).max + 1), low, high)[levels], doubts
    out = np.empty(levels.size, np.uint8)
    flat = levels.reshape(-1)
    for start in range(0, levels.size, _STRIP):
        out[start : start + _STRIP] = _scaled(flat[start : start + _STRIP], low, high)
    return out.reshape(levels.shape), doubts


def _scaled(values: np.ndarray, low: float, high: float) -> np.ndarray:
    levels = (values.astype(np.float64) - low) * 255 / (high - low)
    return np.floor(np.nan_to_num(levels.clip(0, 255)) + 0.5).astype(np.uint8)


def _outliers(values: int, channels: int) -> int:
    """How many of the values may lie outside of the range."""
    pixels = values // channels
    return channels * max(1, pixels // LEFT_OUT) if pixels >= SMALL else 0


def _find_range(top: float, floating: bool) -> Range:
    if floating and top <= UNIT_TOP:
        return 0.0, 1.0
    bits = 8
    while top > (2**bits - 1) * SLACK:
        bits += 2
    return 0.0, float(2**bits - 1)


def _negative(values: np.ndarray, outliers: int) -> Iterator[Doubt]:
    negative = np.count_nonzero(values < 0)
    share = negative / values.size
    if share > 1 / 2:
        ends = f"they go from {values.min():,g} to {values.max():,g}"
        raise ValueError(f"{share:.0%} of its values are negative and would be black, {ends}; {OPTION} sets the range")
    if negative > outliers:
        yield Doubt("negative", f"{share:.1%} of its values are negative and become black; {OPTION} sets the range")
