"""One image file as upright 8-bit RGB. What is read, and how its numbers are understood, is told in docs/data.md."""

import contextlib
import functools
import math
import os
import stat
import struct
import sys
import threading
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import IO, Any

import numpy as np
from PIL import Image, ImageFile

from stellar_fast.data.flags import SharedFlags
from stellar_fast.data.levels import Doubt, Range, check_range, to_8_bits
from stellar_fast.data.metadata import TURNS, UPRIGHT, orientation_of, without_metadata
from stellar_fast.files import kind_of, shown

WHITE = (255, 255, 255)
# Pixels that the threads of a process hold decoded at once; a picture with more is read while no other one is.
PIXELS_AT_ONCE = 1 << 26
# What Pillow registers and is no picture to be seen: programs, headers alone, measurements whose scale Pillow ignores.
NO_PICTURES = frozenset(("BUFR", "EPS", "FITS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"))
TOLD_ONCE = ("few bits", "dark", "negative", "pixels")
# Pillow keeps the upper byte of 16-bit colours. Read in the other byte order, it keeps the lower one.
_OTHER_BYTE = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
# libtiff gives numbers in the machine's order, whatever the file's is.
_FROM_LIBTIFF = {"F;32BF": "F;32NF", "I;32BS": "I;32NS", "I;16BS": "I;16NS"}


class TooManyPixels(ValueError):
    """A picture has more pixels than are allowed."""


def endings() -> dict[str, str]:
    """The endings of files that are read, in small letters -> Pillow's name of the format."""
    _register_heif()
    known = Image.registered_extensions()
    return {
        ending: name
        for ending, name in known.items()
        if name not in NO_PICTURES and (name in Image.OPEN or name == "MPO")  # an MPO is opened as JPEG
    }


def load_image(
    path: str | os.PathLike[str], *, value_range: Range | None = None, max_pixels: int | None = None
) -> Image.Image:
    """Read an image as upright 8-bit RGB.

    The orientation that EXIF asks for is applied. Transparency is laid over white. Of an animation, or of several
    pictures in one file, the first is taken. Colour profiles are ignored. Numbers of more than 8 bits are brought to 8
    by the rule in docs/data.md; a warning says where that is doubtful.

    Args:
        path: of a regular file, or of a link to one.
        value_range: the numbers that become 0 and 255, whatever the file holds.
        max_pixels: pixels that the picture may have; None: what Pillow allows, twice its `Image.MAX_IMAGE_PIXELS`.

    Raises:
        TooManyPixels: a ValueError; the message says how to allow more.
        ValueError: the file is missing, no regular file, truncated, no image, or too large for the memory; the message
            names its path. Or a `value_range` or `max_pixels` that is none.
    """
    return ImageReader(value_range, max_pixels).load(path)


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=2)


class ImageReader:
    """`load_image` for many files, from any number of threads, that tells each kind of doubt once.

    Processes that are forked from this one share what was told.

    Args:
        value_range, max_pixels: as in `load_image`.
        tell: is given each doubt as a sentence.

    Raises:
        ValueError: a range that is none, or `max_pixels` below 1.
    """

    def __init__(
        self,
        value_range: Range | None = None,
        max_pixels: int | None = None,
        tell: Callable[[str], object] = _warn,
    ):
        if max_pixels is not None and max_pixels < 1:
            raise ValueError(f"max_pixels must be at least 1 but is {max_pixels}")
        self.value_range = check_range(value_range)
        self.max_pixels = max_pixels
        self.tell = tell
        self._told = SharedFlags(len(TOLD_ONCE))

    def load(self, path: str | os.PathLike[str]) -> Image.Image:
        """What `load_image` returns and raises."""
        with self.opened(path) as image:
            return image

    @contextlib.contextmanager
    def opened(self, path: str | os.PathLike[str]) -> Iterator[Image.Image]:
        """The same for work that uses the image up: until it ends, the picture counts among PIXELS_AT_ONCE.

        Raises:
            ValueError: as `load_image`, and where memory is short for the work.
        """
        with contextlib.ExitStack() as held:
            try:
                image, doubts = self._read(path, held)
            except TooManyPixels as error:
                raise TooManyPixels(f"cannot read image {shown(path)}: {error}") from error
            except Exception as error:  # a broken file makes the decoders raise nearly anything, SyntaxError included
                raise ValueError(f"cannot read image {shown(path)}: {_reason(error)}") from error
            for doubt in doubts:
                if self.once(doubt.kind):
                    self.tell(f"{shown(path)}: {doubt.text}. Other files like it are not told.")
            try:
                yield image
            except MemoryError as error:
                raise ValueError(f"cannot read image {shown(path)}: {_too_little_memory(image)}") from error

    def once(self, kind: str) -> bool:
        """Whether this kind (of TOLD_ONCE) was not told before; from now on it was."""
        return self._told.put_up(TOLD_ONCE.index(kind))

    def _read(self, path: str | os.PathLike[str], held: contextlib.ExitStack) -> tuple[Image.Image, list[Doubt]]:
        by_pillow = _pillow_limit.value()
        limit = self.max_pixels or 2 * by_pillow
        with open_regular(path) as file:
            source, turn = without_metadata(file)
            try:
                image = _identify(source)
            except Image.DecompressionBombError:
                if limit <= 2 * by_pillow:
                    raise _too_many_pixels("it has", limit) from None
                with _pillow_limit.lifted():
                    image = _identify(source)
            pixels = image.width * image.height
            if pixels > limit:
                raise _too_many_pixels(f"its {image.width:,} x {image.height:,} pixels are", limit)
            held.enter_context(_budget.hold(pixels))
            turn = orientation_of(image.info) if turn == UPRIGHT else turn
            with _pillow_limit.lifted() if pixels > by_pillow else contextlib.nullcontext():
                try:
                    rgb, doubts = self._to_rgb(image, source)
                    return rgb if turn == UPRIGHT else rgb.transpose(TURNS[turn]), doubts
                except MemoryError as error:
                    raise MemoryError(_too_little_memory(image)) from error

    def _to_rgb(self, image: ImageFile.ImageFile, source: IO[bytes]) -> tuple[Image.Image, list[Doubt]]:
        levels, alpha, bits = _numbers(image, source)
        if levels is None:
            image.load()
            picture: Image.Image = image.convert("LA") if image.mode == "La" else image
            picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
            if self.value_range is None:
                return _over_white(picture), []
            levels, bits = np.asarray(picture), 8
            if picture.mode == "RGBA":
                levels, alpha = levels[..., :3], levels[..., 3]
        colours, doubts = to_8_bits(levels, self.value_range, bits)
        if _zero_is_white(image):
            colours = 255 - colours
        picture = Image.fromarray(colours).convert("RGB")
        if alpha is not None:
            picture.putalpha(Image.fromarray(np.ascontiguousarray(alpha)))
        return _over_white(picture), doubts


def open_regular(path: str | os.PathLike[str]) -> IO[bytes]:
    """Open a regular file, or a link to one, to read its bytes.

    Raises:
        ValueError: it is a folder, a FIFO, a socket or a device. None of them is waited for.
        OSError: it cannot be opened.
    """

    def check(mode: int) -> None:
        if not stat.S_ISREG(mode):
            raise ValueError(f"it is {kind_of(mode)}, not a file")

    check(os.stat(path).st_mode)
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        check(os.fstat(handle).st_mode)  # another may have taken its place
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def _identify(source: IO[bytes]) -> ImageFile.ImageFile:
    """Pillow's `Image.open` for the formats that are read alone, without its look at the number of pixels."""
    source.seek(0)
    prefix = source.read(16)
    if not prefix:
        raise ValueError("the file is empty")
    reasons = []
    for name in _formats(len(Image.OPEN)):
        factory, accept = Image.OPEN[name]
        accepted = accept is None or accept(prefix)
        if isinstance(accepted, str):
            reasons.append(accepted)
        elif accepted:
            source.seek(0)
            try:
                return factory(source, "")
            except (SyntaxError, IndexError, TypeError, struct.error) as error:
                if accept is not None:
                    reasons.append(f"as {name}: {error}".replace("not identified by this driver", "it has no pixels"))
    if not reasons and prefix[4:8] == b"ftyp":
        reasons.append("of HEIF's kind: pip install pillow-heif")
    raise ValueError(f"it is no image that can be read ({'; '.join(reasons)})" if reasons else "it is no image")


@functools.lru_cache(maxsize=1)
def _formats(registered: int) -> list[str]:
    """Pillow's names of the formats that are read; those that take any beginning for theirs come last."""
    return sorted(set(endings().values()) & set(Image.OPEN), key=lambda name: (Image.OPEN[name][1] is None, name))


def _numbers(image: ImageFile.ImageFile, source: IO[bytes]) -> tuple[np.ndarray | None, np.ndarray | None, int]:
    """A picture of more than 8 bits: its numbers (H, W) or (H, W, 3), its alpha (H, W) as uint8, and its bits.

    The numbers are None for a picture of 8 bits or fewer, which is not decoded then; alpha is None where there is none.
    """
    tags: dict[int, Any] = getattr(image, "tag_v2", {})
    stored, signed = tags.get(258, (0,))[0], tags.get(339, (1,))[0] == 2
    codec, raw = "", ""
    if image.tile:
        codec, args = image.tile[0][0], image.tile[0][3]
        raw = str(args[0] if isinstance(args, tuple) and args else args)
        if codec == "ppm" and args == ("RGB", 65535):
            raw = "RGB;16B"
    if stored > 8 and tags.get(284) == 2 and tags.get(277, 1) > 1:  # Pillow garbles them, or keeps the upper bytes
        raise ValueError(f"its {stored}-bit colours are stored in separate planes, which is not read: interleave them")
    if raw == "LA;16B":  # Pillow has no mode for both
        both = _loaded(image, "RGBA")
        return _joined(both[..., 0], both[..., 1]), both[..., 2], 16
    if raw[:-1] in ("RGB;16", "RGBX;16", "RGBA;16"):
        upper = _loaded(image, raw)
        lower = _loaded(_identify(source), raw[:-1] + _OTHER_BYTE[raw[-1]])
        levels = _joined(upper[..., :3], lower[..., :3])
        alpha = upper[..., 3] if upper.shape[2] == 4 else _opaque(levels, image.info.get("transparency"))
        return levels, alpha, 16
    if image.mode != "F" and not image.mode.startswith("I"):
        return None, None, 8
    levels = _loaded(image, _FROM_LIBTIFF.get(raw) if codec == "libtiff" else None)
    if image.mode == "F":
        return levels, None, 0
    bits = stored or (16 if image.mode != "I" or image.format in ("PNG", "PPM") else 32)
    if bits == 32 and tags and not signed:  # Pillow's mode is signed
        levels = levels.view(np.uint32)
    return levels, _opaque(levels, image.info.get("transparency")), bits - signed


def _loaded(image: ImageFile.ImageFile, raw: str | None = None) -> np.ndarray:
    """The decoded numbers in the machine's byte order, unpacked by another of Pillow's raw modes where one is named."""
    if raw is not None:
        tiles: list[Any] = []  # named tuples, or in older versions plain ones
        for tile in image.tile:
            codec, extents, offset, args = tile
            if codec == "ppm":  # which scales to 8 bits
                codec, args = "raw", (raw, 0, 1)
            else:
                args = (raw, *args[1:]) if isinstance(args, tuple) else raw
            values = codec, extents, offset, args
            tiles.append(type(tile)(*values) if hasattr(tile, "_fields") else values)
        image.tile = tiles
    image.load()
    levels = np.asarray(image)
    return levels.astype(levels.dtype.newbyteorder("="), copy=False)


def _joined(upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
    return upper.astype(np.uint16) << 8 | lower


def _opaque(levels: np.ndarray, transparent: object) -> np.ndarray | None:
    """Alpha as uint8 of a PNG that names one number or colour as transparent."""
    if not isinstance(transparent, (int, tuple)):
        return None
    same = levels == np.array(transparent)
    return np.where(same.all(-1) if levels.ndim == 3 else same, 0, 255).astype(np.uint8)


def _zero_is_white(image: Image.Image) -> bool:
    """Whether a TIFF counts from white to black, which Pillow heeds up to 8 bits."""
    return bool(getattr(image, "tag_v2", {}).get(262) == 0 and (image.mode.startswith("I") or image.mode == "F"))


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, (*WHITE, 255)), image).convert("RGB")


def _reason(error: Exception) -> str:
    """An error as the end of a sentence, on one line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


def _too_little_memory(image: Image.Image) -> str:
    return f"too little memory for its {image.width:,} x {image.height:,} pixels"


def _too_many_pixels(what: str, limit: float) -> TooManyPixels:
    return TooManyPixels(f"{what} more than {limit:,} pixels; --max-pixels N (max_pixels=N) allows more")


@functools.cache
def _register_heif() -> None:
    with contextlib.suppress(ImportError):
        from pillow_heif import register_heif_opener  # type: ignore[import-not-found,unused-ignore]

        register_heif_opener()


class _Budget:
    """A sum of weights that is never exceeded: what does not fit waits, in the order of coming."""

    def __init__(self, size: int):
        self._size = size
        self._used = 0
        self._waiting: deque[object] = deque()
        self._holders: Counter[int] = Counter()  # by thread
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def hold(self, weight: int) -> Iterator[None]:
        """Wait for room; more than the whole waits for all of it. A thread that holds some already does not wait."""
        weight, thread, ticket = min(weight, self._size), threading.get_ident(), object()
        with self._changed:
            if not self._holders[thread]:
                self._waiting.append(ticket)
                try:
                    self._changed.wait_for(lambda: self._waiting[0] is ticket and self._used + weight <= self._size)
                finally:
                    self._waiting.remove(ticket)
                    self._changed.notify_all()
            self._used += weight
            self._holders[thread] += 1
        try:
            yield
        finally:
            with self._changed:
                self._used -= weight
                self._holders -= Counter((thread,))
                self._changed.notify_all()


class _PillowLimit:
    """Pillow's limit on pixels, which is one for all threads, lifted while any of them reads a larger picture."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._readers = 0
        self._limit: int | None = None

    def value(self) -> float:
        with self._lock:
            return (self._limit if self._readers else Image.MAX_IMAGE_PIXELS) or math.inf

    @contextlib.contextmanager
    def lifted(self) -> Iterator[None]:
        with self._lock:
            if not self._readers:
                self._limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            self._readers += 1
        try:
            yield
        finally:
            with self._lock:
                self._readers -= 1
                if not self._readers:
                    Image.MAX_IMAGE_PIXELS = self._limit


_budget = _Budget(PIXELS_AT_ONCE)
_pillow_limit = _PillowLimit()


def _begin_anew() -> None:
    """A forked process has none of the threads that hold or wait for something here."""
    global _budget, _pillow_limit
    if _pillow_limit._readers:
        Image.MAX_IMAGE_PIXELS = _pillow_limit._limit
    _budget, _pillow_limit = _Budget(PIXELS_AT_ONCE), _PillowLimit()


os.register_at_fork(after_in_child=_begin_anew)
