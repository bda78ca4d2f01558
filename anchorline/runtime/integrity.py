"""Finding image files that were cut off or damaged, which decoders may fill with grey in silence."""

from __future__ import annotations

import re
import zlib

_JPEG_START = b"\xff\xd8"
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_START_OF_SCAN = 0xDA
_END_OF_IMAGE = 0xD9
_RESTART_INTERVAL = 0xDD
_JPEG_BARE_MARKERS = {0x01, *range(0xD0, 0xD9)}  # TEM, restarts and a second start: no segment follows
_JPEG_TABLES = {0xC4, *range(0xDA, 0xDE), *range(0xE0, 0xF0), 0xFE}  # tables, scans, APPn, comments
_JPEG_SEGMENTS = _JPEG_TABLES | set(range(0xC0, 0xF0)) - set(range(0xD0, 0xDA))  # frame headers as well

# Inside a scan FF 00 is a stuffed byte and FF FF padding; FF D0..D7 are restarts where the file has
# declared an interval for them. Anything else ends the scan.
_SCAN_END = re.compile(rb"\xff[^\x00\xff]")
_SCAN_END_WITH_RESTARTS = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")


def find_damage(content: bytes) -> str | None:
    """Say what is wrong with the bytes of an image file, or ``None``.

    Checks the structure of JPEG (down to the end-of-image marker) and PNG (down to IEND, with every
    checksum), and the length that WebP states; other formats are left to their decoder.
    """
    if content.startswith(_JPEG_START):
        return _jpeg_damage(content)
    if content.startswith(_PNG_SIGNATURE):
        return _png_damage(content)
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        stated = int.from_bytes(content[4:8], "little") + 8
        return _cut_off(len(content), stated) if len(content) < stated else None
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
    position = len(_PNG_SIGNATURE)
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


def _cut_off(length: int, stated: int) -> str:
    return f"truncated: {length} bytes of the {stated} that its header states"
