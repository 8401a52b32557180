"""Files that Pillow reads and does not write: 16-bit colours, TIFF of any numbers and with any further tags."""

import struct
import zlib
from pathlib import Path

import numpy as np

Entry = tuple[int, int, int, bytes]  # tag, TIFF's type, count, the 4 bytes that follow


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(path: Path, pixels: np.ndarray, *chunks: bytes) -> Path:
    """16-bit PNG of (H, W) or (H, W, 2, 3 or 4), with further chunks before the pixels."""
    height, width = pixels.shape[:2]
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[pixels.size // (height * width)]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0))
    body = b"".join(chunks) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + body)
    return path


def ppm(path: Path, pixels: np.ndarray, top: int = 65535) -> Path:
    """16-bit PPM of (H, W, 3)."""
    path.write_bytes(f"P6 {pixels.shape[1]} {pixels.shape[0]} {top}\n".encode() + pixels.astype(">u2").tobytes())
    return path


def entries(order: str, *fields: Entry) -> bytes:
    """A TIFF directory, with none after it."""
    packed = b"".join(struct.pack(f"{order}HHI", *field[:3]) + field[3].ljust(4, b"\0") for field in sorted(fields))
    return struct.pack(f"{order}H", len(fields)) + packed + bytes(4)


def exif(*fields: Entry, order: str = "<") -> bytes:
    """A block of EXIF with one directory."""
    magic = b"II*\0" if order == "<" else b"MM\0*"
    return b"Exif\0\0" + magic + struct.pack(f"{order}I", 8) + entries(order, *fields)


def tiff(
    path: Path,
    pixels: np.ndarray,
    *more: Entry,
    order: str = "<",
    deflate: bool = False,
    zero_is_white: bool = False,
    planes: bool = False,
) -> Path:
    """TIFF of (H, W) or (H, W, 3 or 4) of any dtype, in one strip, or with `planes` in one for each colour."""
    height, width = pixels.shape[:2]
    channels = pixels.size // (height * width)
    stored = pixels.astype(pixels.dtype.newbyteorder(order))
    strips = [stored.tobytes()] if not planes else [stored[..., i].tobytes() for i in range(channels)]
    strips = [zlib.compress(strip) for strip in strips] if deflate else strips

    def numbers(tag: int, *values: int) -> Entry:
        nonlocal data
        kind = f"{order}{len(values)}I"
        if len(values) == 1:
            return tag, 4, 1, struct.pack(kind, *values)
        place = 8 + len(data)
        data += struct.pack(kind, *values)
        return tag, 4, len(values), struct.pack(f"{order}I", place)

    data, places = b"", []
    for strip in strips:
        places.append(8 + len(data))
        data += strip + bytes(-len(strip) % 4)
    photometric = 2 if channels > 2 else 0 if zero_is_white else 1
    fields = [numbers(256, width), numbers(257, height), numbers(258, *[8 * pixels.itemsize] * channels)]
    fields += [numbers(259, 8 if deflate else 1), numbers(262, photometric), numbers(273, *places)]
    fields += [numbers(277, channels), numbers(278, height), numbers(279, *map(len, strips))]
    fields += [
        numbers(284, 2 if planes else 1),
        numbers(339, *[{"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]] * channels),
    ]
    fields += [numbers(338, 2)] if channels == 4 else []
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(data))
    path.write_bytes(head + data + entries(order, *fields, *more))
    return path
