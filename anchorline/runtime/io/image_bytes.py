"""What the bytes of an image or a video file say of it: which of the two, size, bits of a sample, damage."""

from __future__ import annotations

import math
import re
import struct
import zlib
from collections.abc import Callable
from typing import NamedTuple

# What video files begin with: GIF, Matroska, AVI, Flash, ASF, Ogg, IVF, YUV4MPEG; MP4 and QuickTime, whose
# container holds pictures as well; MPEG transport streams; and start codes, of MPEG, H.264 and HEVC.
_VIDEO_START = re.compile(
    rb"GIF8[79]a|\x1aE\xdf\xa3|RIFF.{4}AVI |FLV\x01|0&\xb2u\x8ef\xcf\x11|OggS|DKIF|YUV4MPEG2 "
    rb"|.{4}(?:ftyp(?!avi[fs]|hei|mif1|msf1)|moov|mdat|free|wide)"
    rb"|G.{187}G|\x00?\x00\x00\x01[\xb3\xba\x09\x27\x47\x67\x40\x46]",
    re.DOTALL,
)

_Header = tuple[int, ...] | None

_JPEG_START = b"\xff\xd8"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_START_OF_SCAN = 0xDA
_END_OF_IMAGE = 0xD9
_RESTART_INTERVAL = 0xDD
_JPEG_BARE_MARKERS = {0x01, *range(0xD0, 0xD9)}  # TEM, restarts and a second start: no segment follows
_JPEG_TABLES = {0xC4, *range(0xDA, 0xDE), *range(0xE0, 0xF0), 0xFE}  # tables, scans, APPn, comments
_JPEG_SEGMENTS = _JPEG_TABLES | set(range(0xC0, 0xF0)) - set(range(0xD0, 0xDA))  # frame headers as well

# Start-of-frame markers carry the size; C4, C8 and CC in that range are tables and extensions.
_JPEG_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}

# Inside a scan FF 00 is a stuffed byte and FF FF padding; FF D0..D7 are restarts where the file has
# declared an interval for them. Anything else ends the scan.
_SCAN_END = re.compile(rb"\xff[^\x00\xff]")
_SCAN_END_WITH_RESTARTS = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")


def begins_as_video(head: bytes) -> bool:
    """Whether a file that begins so holds a video; a GIF or an animated PNG is one."""
    if head.startswith(PNG_SIGNATURE):
        control = head.partition(b"IDAT")[0].partition(b"acTL")[2]  # begins with the number of frames
        return int.from_bytes(control[:4], "big") > 1
    return _VIDEO_START.match(head) is not None


def find_damage(content: bytes) -> str | None:
    """Say what is wrong with the bytes of an image file, which decoders may fill with grey in silence, or
    ``None``.

    Checks the structure of JPEG (down to the end-of-image marker) and PNG (down to IEND, with every
    checksum), and the length that WebP states; other formats are left to their decoder.
    """
    if content.startswith(_JPEG_START):
        return _jpeg_damage(content)
    if content.startswith(PNG_SIGNATURE):
        return _png_damage(content)
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        stated = int.from_bytes(content[4:8], "little") + 8
        if len(content) < stated:
            return f"truncated: {len(content)} bytes of the {stated} that its header states"
    return None


def _jpeg_damage(content: bytes) -> str | None:
    """Walk the segments from marker to marker: a thumbnail's end inside EXIF is not the picture's."""
    position = len(_JPEG_START)
    allowed, scan_end = _JPEG_SEGMENTS | _JPEG_BARE_MARKERS, _SCAN_END
    while True:
        position = content.find(b"\xff", position)
        if position < 0 or position + 1 >= len(content):
            return "truncated: the JPEG stops before its end-of-image marker"
        marker = content[position + 1]
        position += 1 if marker == 0xFF else 2
        if marker == _END_OF_IMAGE:
            return None
        if marker == 0xFF:
            continue
        if marker not in allowed:
            return f"damaged: JPEG marker FF{marker:02X} where none belongs, at byte {position - 2}"
        if marker in _JPEG_BARE_MARKERS:
            continue
        length = int.from_bytes(content[position : position + 2], "big")
        if marker == _RESTART_INTERVAL and any(content[position + 2 : position + 4]):
            scan_end = _SCAN_END_WITH_RESTARTS
        position += length
        if marker == _START_OF_SCAN:
            end = scan_end.search(content, position)
            position = end.start() if end else len(content)
            allowed = _JPEG_TABLES


def _png_damage(content: bytes) -> str | None:
    position = len(PNG_SIGNATURE)
    while position + 12 <= len(content):
        body_end = position + 8 + int.from_bytes(content[position : position + 4], "big")
        if body_end + 4 > len(content):
            break
        checksum = int.from_bytes(content[body_end : body_end + 4], "big")
        kind = content[position + 4 : position + 8]
        if zlib.crc32(memoryview(content)[position + 4 : body_end]) != checksum:
            return f"damaged: the checksum of PNG chunk {kind.decode('latin-1')} does not match"
        if kind == b"IEND":
            return None
        position = body_end + 4
    return "truncated: the PNG stops before its IEND chunk"


class ImageHeader(NamedTuple):
    """What an image file states of itself: (height, width) as stored, before it is turned upright, and the
    bits of a sample."""

    size: tuple[int, int]
    bits: int = 8


def read_header(content: bytes) -> ImageHeader | None:
    """The header at the beginning of an image file; None where the format is none of those that are read
    (JPEG, PNG, BMP, GIF, TIFF, WebP, PBM to PPM, JPEG 2000 and AVIF), it is damaged, or lies further on."""
    try:
        found = next((read(content) for start, read in _HEADERS if start.match(content)), None)
    except (struct.error, IndexError, OverflowError):
        return None
    if found is None:
        return None
    width, height, *bits = found
    return ImageHeader((height, width), *bits)


# Of each format: width, height and, where it may be other than 8, the bits of a sample.


def _jpeg_header(content: bytes) -> _Header:
    at = len(_JPEG_START)
    while (at := content.find(b"\xff", at)) >= 0:  # the segments up to the start of frame
        marker = content[at + 1]
        if marker == _START_OF_SCAN:
            break
        if marker in _JPEG_START_OF_FRAME:
            bits, height, width = struct.unpack_from(">BHH", content, at + 4)
            return width, height, bits
        at += 1 if marker == 0xFF else 2 + int.from_bytes(content[at + 2 : at + 4], "big")
    return None


def _bmp_header(content: bytes) -> _Header:
    width, height = struct.unpack_from("<HH" if content[14] == 12 else "<ii", content, 18)  # 12: the old form
    return abs(width), abs(height)


def _webp_header(content: bytes) -> _Header:
    kind = content[12:16]
    if kind == b"VP8X":
        return tuple(int.from_bytes(content[at : at + 3], "little") + 1 for at in (24, 27))
    if kind == b"VP8L":
        bits = int.from_bytes(content[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return tuple(side & 0x3FFF for side in struct.unpack_from("<HH", content, 26))


def _tiff_header(content: bytes) -> _Header:
    """Of the first directory, which is the one that is read."""
    order, big = "<>"[content[0] == ord("M")], 43 in content[2:4]
    (at,) = struct.unpack_from(order + ("Q" if big else "I"), content, 8 if big else 4)
    (count,) = struct.unpack_from(order + ("Q" if big else "H"), content, at)
    at += 8 if big else 2
    found: dict[int, int] = {}
    for entry in range(at, at + min(count, 1000) * (20 if big else 12), 20 if big else 12):
        tag, kind = struct.unpack_from(order + "HH", content, entry)
        (length,) = struct.unpack_from(order + ("Q" if big else "I"), content, entry + 4)
        number = {1: "B", 3: "H", 4: "I", 16: "Q"}.get(kind)
        if tag not in (256, 257, 258) or number is None:
            continue
        value = entry + (12 if big else 8)
        if length * struct.calcsize(number) > (8 if big else 4):  # it stands elsewhere
            (value,) = struct.unpack_from(order + ("Q" if big else "I"), content, value)
        found[tag] = max(found.get(tag, 0), *struct.unpack_from(order + number, content, value))
    return (found[256], found[257], found.get(258, 1)) if {256, 257} <= found.keys() else None


def _pnm_header(content: bytes) -> _Header:
    numbers = _PNM_NUMBERS.match(content)
    if numbers is None:
        return None
    bitmap = content[1:2] in b"14"
    return int(numbers[1]), int(numbers[2]), 16 if not bitmap and int(numbers[3] or b"0") > 255 else 8


def _jpeg2000_header(content: bytes) -> _Header:
    at = 0
    while content[at : at + 2] != b"\xff\x4f":  # the boxes up to the codestream
        length, kind = struct.unpack_from(">I4s", content, at)
        body = at + (16 if length == 1 else 8)
        if length == 1:
            (length,) = struct.unpack_from(">Q", content, at + 8)
        if length < body - at and kind != b"jp2c":
            return None
        at = body if kind == b"jp2c" else at + length
    right, bottom, left, top = struct.unpack_from(">4I", content, at + 8)
    return right - left, bottom - top, (content[at + 42] & 0x7F) + 1


def _avif_header(content: bytes) -> _Header:
    """The largest of the parts' sizes, all of which stand before the pixels."""
    places = [found.end() for found in re.finditer(b"ispe", content[: content.find(b"mdat")])]
    sizes = [struct.unpack_from(">II", content, place + 4) for place in places]
    return max(sizes, key=math.prod, default=None)


_PNM_GAP = rb"(?:\s|#[^\r\n]*[\r\n])+"
_PNM_NUMBERS = re.compile(rb"P[1-6]%b(\d{1,10})%b(\d{1,10})(?:%b(\d{1,10}))?" % ((_PNM_GAP,) * 3))
_HEADERS: tuple[tuple[re.Pattern[bytes], Callable[[bytes], _Header]], ...] = tuple(
    (re.compile(start, re.DOTALL), read)
    for start, read in (
        (rb"\xff\xd8", _jpeg_header),
        (rb"\x89PNG\r\n\x1a\n.{4}IHDR", lambda content: struct.unpack_from(">IIB", content, 16)),
        (rb"BM", _bmp_header),
        (rb"GIF8", lambda content: struct.unpack_from("<HH", content, 6)),
        (rb"RIFF.{4}WEBP", _webp_header),
        (rb"II[*+]\x00|MM\x00[*+]", _tiff_header),
        (rb"P[1-6]", _pnm_header),
        (rb"\x00\x00\x00\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51", _jpeg2000_header),
        (rb".{4}ftyp", _avif_header),
    )
)
