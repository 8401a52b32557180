"""What a picture's file says beside its pixels: its orientation is read here, and no decoder sees the rest.

Decoders look into EXIF by themselves, and a damaged entry there makes a healthy picture unreadable. So the file that
they get lacks it. Nothing in it changes a pixel but the orientation.
"""

import io
import re
import struct
import zlib
from bisect import bisect_right
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

from PIL import Image

UPRIGHT = 1
ORIENTATION, XMP = 0x0112, 700  # tags
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# TIFF's tags without which its pixels cannot be decoded; 50674 is LERC's.
_PIXEL_TAGS = frozenset((*range(254, 260), 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, *range(320, 326), 332))
_PIXEL_TAGS |= frozenset((338, 339, 340, 341, 347, *range(512, 522), *range(529, 533), 50674))
_BYTES = dict(zip(range(1, 19), (1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8), strict=True))  # of TIFF's types
_WHOLE_NUMBERS = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i"}  # TIFF's types that an orientation may have
_MOST_ENTRIES = 4096  # of a directory that are looked at; real ones have fewer than a hundred
_MOST_BYTES = 1 << 20  # of a block of metadata that are looked at
_IN_XMP = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')
_EXIF_ITEM = re.compile(rb"infe(?:\x02.{3}.{2}|\x03.{3}.{4}).{2}(Exif)", re.DOTALL)


class Change(NamedTuple):
    """Bytes `start` to `stop` of a file, replaced by others."""

    start: int
    stop: int
    content: bytes = b""


def without_metadata(file: IO[bytes]) -> tuple[IO[bytes], int]:
    """What a decoder is given in a file's place, and the orientation that the file asks for, 1 to 8.

    JPEG, PNG, TIFF and the formats in HEIF's container are known here; for others see `orientation_of`.

    Raises:
        ValueError: a TIFF without a directory.
    """
    file.seek(0)
    head = file.read(16)
    for beginning, take_out in ((b"\xff\xd8", _jpeg), (b"\x89PNG\r\n\x1a\n", _png), (b"II", _tiff), (b"MM", _tiff)):
        if head.startswith(beginning):
            changes, orientation = take_out(file)
            file.seek(0)
            return (io.BufferedReader(_Changed(file, changes), 1 << 16) if changes else file), orientation
    if head[4:8] == b"ftyp":
        file.seek(0)
        whole = file.read()
        return io.BytesIO(_EXIF_ITEM.sub(lambda item: item[0][:-4] + b"none", whole)), UPRIGHT
    return file, UPRIGHT


def orientation_of(info: dict[Any, Any]) -> int:
    """The orientation in what a decoder found beside the pixels (Pillow's `info`), 1 to 8."""
    exif, xmp = info.get("exif"), info.get("xmp")
    return _orientation(exif if isinstance(exif, bytes) else b"", xmp if isinstance(xmp, bytes) else b"")


def _orientation(exif: bytes, xmp: bytes) -> int:
    """That of a block of EXIF, else of XMP, else 1."""
    block = re.sub(rb"^(?:Exif\0\0)+", b"", exif)
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(block[:4])
    if order and len(block) >= 8:
        (start,) = struct.unpack_from(f"{order}I", block, 4)
        for entry in _entries(block[start : start + _MOST_BYTES], order):
            found = _legible(entry, order)
            if found:
                return found
    match = _IN_XMP.search(xmp)
    return int(match[1]) if match else UPRIGHT


def _entries(directory: bytes, order: str, big: bool = False) -> Iterator[bytes]:
    """The entries of a TIFF directory, 12 bytes each (BigTIFF: 20), as many as are there."""
    head, size = (8, 20) if big else (2, 12)
    if len(directory) < head:
        return
    (count,) = struct.unpack_from(f"{order}{'Q' if big else 'H'}", directory)
    for start in range(head, head + size * min(count, _MOST_ENTRIES), size):
        if start + size > len(directory):
            return
        yield directory[start : start + size]


def _legible(entry: bytes, order: str) -> int | None:
    """The orientation that an entry gives, 1 to 8."""
    tag, kind = struct.unpack_from(f"{order}HH", entry)
    if tag != ORIENTATION or kind not in _WHOLE_NUMBERS:
        return None
    big = len(entry) == 20
    (count,) = struct.unpack_from(f"{order}{'Q' if big else 'I'}", entry, 4)
    if count * struct.calcsize(_WHOLE_NUMBERS[kind]) > (8 if big else 4):  # the value stands elsewhere
        return None
    (value,) = struct.unpack_from(f"{order}{_WHOLE_NUMBERS[kind]}", entry, 12 if big else 8)
    return value if value in TURNS or value == UPRIGHT else None


def _jpeg(file: IO[bytes]) -> tuple[list[Change], int]:
    """All application segments but JFIF's and Adobe's, which say what the colours are."""
    changes: list[Change] = []
    exif, xmp, place = b"", b"", 2
    while True:
        file.seek(place)
        marker = file.read(4)
        if len(marker) < 4 or marker[0] != 0xFF or marker[1] in (0xD9, 0xDA):  # the end, or the pixels begin
            return changes, _orientation(exif, xmp)
        if marker[1] == 0xFF:  # padding
            place += 1
            continue
        if marker[1] in (0x01, *range(0xD0, 0xD9)):  # those alone have no length
            place += 2
            continue
        length = int.from_bytes(marker[2:], "big")
        if 0xE1 <= marker[1] <= 0xEF and marker[1] != 0xEE:
            content = file.read(length - 2) if marker[1] == 0xE1 and length > 2 else b""
            if content.startswith(b"Exif\0\0"):
                exif += content[6:]
            elif content.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
                xmp += content
            changes.append(Change(place, place + 2 + length))
        place += 2 + length


def _png(file: IO[bytes]) -> tuple[list[Change], int]:
    """All chunks that are not critical but the transparent colours."""
    changes: list[Change] = []
    exif, xmp, place = b"", b"", 8
    while True:
        file.seek(place)
        head = file.read(8)
        if len(head) < 8:
            return changes, _orientation(exif, xmp)
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        if kind == b"IEND" or not kind.isalpha():
            return changes, _orientation(exif, xmp)
        stop = place + 12 + length
        if kind[0] & 0x20 and kind != b"tRNS":  # a small first letter
            content = file.read(min(length, _MOST_BYTES)) if kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt") else b""
            if kind == b"eXIf":
                exif = content
            elif content.startswith(b"Raw profile type exif\0") and not exif:
                exif = _raw_profile(content.partition(b"\0")[2], kind)
            elif content.startswith(b"XML:com.adobe.xmp\0"):
                xmp += content
            changes.append(Change(place, stop))
        place = stop


def _raw_profile(text: bytes, kind: bytes) -> bytes:
    """EXIF as ImageMagick writes it into a text: a name, a length, hexadecimal digits."""
    try:
        text = zlib.decompressobj().decompress(text[1:], _MOST_BYTES) if kind == b"zTXt" else text
        return bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode("ascii"))
    except (zlib.error, ValueError):
        return b""


def _tiff(file: IO[bytes]) -> tuple[list[Change], int]:
    """All entries of the first directory that the pixels do not need, and all directories after it."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    head = file.read(16).ljust(16, b"\0")
    order = "<" if head[:2] == b"II" else ">"
    (version,) = struct.unpack_from(f"{order}H", head, 2)
    if version not in (42, 43):
        return [], UPRIGHT
    big = version == 43
    (start,) = struct.unpack_from(f"{order}Q", head, 8) if big else struct.unpack_from(f"{order}I", head, 4)
    file.seek(min(start, size))
    kept, orientation, xmp = [], None, b""
    for entry in _entries(file.read(8 + 20 * _MOST_ENTRIES), order, big):
        tag, kind = struct.unpack_from(f"{order}HH", entry)
        count, offset = struct.unpack_from(f"{order}{'QQ' if big else 'II'}", entry, 4)
        elsewhere = count * _BYTES.get(kind, 0)
        if elsewhere > (8 if big else 4) and offset + elsewhere > size:
            continue
        if tag in _PIXEL_TAGS:
            kept.append(entry)
        elif tag == ORIENTATION:
            orientation = _legible(entry, order) or orientation
        elif tag == XMP:
            file.seek(min(offset, size))
            xmp = file.read(min(elsewhere, _MOST_BYTES))
    if not kept:
        raise ValueError("it is a TIFF without a directory, or cut off before it")
    number = struct.pack(f"{order}{'Q' if big else 'H'}", len(kept))
    directory = number + b"".join(kept) + bytes(8 if big else 4)  # no directory follows
    return [Change(start, start + len(directory), directory)], orientation or _orientation(b"", xmp)


class _Changed(io.RawIOBase):
    """A file as it reads after changes, which are in order and do not touch each other."""

    def __init__(self, file: IO[bytes], changes: list[Change]):
        self._file = file
        self._pieces: list[tuple[int, int, bytes | None]] = []  # where it begins; where in the file, or its bytes
        self._size = place = 0
        for change in (*changes, Change(file.seek(0, io.SEEK_END), 0)):
            if change.start > place:
                self._pieces.append((self._size, place, None))
                self._size += change.start - place
            if change.content:
                self._pieces.append((self._size, 0, change.content))
                self._size += len(change.content)
            place = change.stop
        self._starts = [start for start, _, _ in self._pieces]
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        if self._place < 0:
            raise ValueError(f"no place {self._place} in a file")
        return self._place

    def readinto(self, buffer: Any, /) -> int:
        if self._place >= self._size:
            return 0
        number = bisect_right(self._starts, self._place) - 1
        start, source, content = self._pieces[number]
        skip = self._place - start
        stop = self._pieces[number + 1][0] if number + 1 < len(self._pieces) else self._size
        with memoryview(buffer).cast("B") as view:
            wanted = min(len(view), stop - self._place)
            if content is None:
                self._file.seek(source + skip)
                read = self._file.readinto(view[:wanted])  # type: ignore[attr-defined]
            else:
                view[:wanted] = content[skip : skip + wanted]
                read = wanted
        self._place += read
        return read
