"""What a source's reader has to be, and the readers for still pictures and iterators of frames."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.errors import SettingsError
from anchorline.runtime.images import read_image
from anchorline.runtime.pipeline.source import DECODERS, Decoder
from anchorline.runtime.pipeline.stream_reader import StreamReader
from anchorline.runtime.preprocess import check_frame
from anchorline.runtime.sources import Item
from anchorline.runtime.video import VideoReader

Numbered = tuple[int, float, NDArray[np.uint8]]  # index, time in seconds, pixels


class Reader(Protocol):
    """One opening of a file, a camera or a stream; opening it is its constructor's work.

    Iterated once it yields (index, time in seconds, uint8 BGR frame [H, W, 3]) and ends where the
    stream ends or breaks off. ``size`` is the (height, width) of the first frame, ``fps`` the stated
    rate, ``warnings`` what was wrong so far. All calls come from one thread. A constructor raises
    ``DataError``.
    """

    size: tuple[int, int]
    fps: float

    @property
    def warnings(self) -> list[str]: ...

    def __iter__(self) -> Iterator[Numbered]: ...

    def close(self) -> None: ...


class ImageReader:
    """An image file as a stream of one frame."""

    fps = 1.0
    warnings: list[str] = []  # noqa: RUF012 - always empty, see Reader

    def __init__(self, path: Path) -> None:
        self._image = read_image(path)
        self.size: tuple[int, int] = (self._image.shape[0], self._image.shape[1])

    def __iter__(self) -> Iterator[Numbered]:
        yield 0, 0.0, self._image

    def close(self) -> None:
        """Nothing is open."""


class IterableReader:
    """Frames that the caller's own code delivers; ``time_s`` counts from the first one."""

    fps = 25.0
    warnings: list[str] = []  # noqa: RUF012

    def __init__(self, frames: Iterable[NDArray[np.uint8]]) -> None:
        self._frames = iter(frames)
        self._first = next(self._frames, None)
        self.size = (0, 0) if self._first is None else check_frame(self._first).shape[:2]

    def __iter__(self) -> Iterator[Numbered]:
        start, index, frame = time.monotonic(), 0, self._first
        self._first = None
        while frame is not None:
            yield index, time.monotonic() - start if index else 0.0, check_frame(frame)
            index += 1
            frame = next(self._frames, None)

    def close(self) -> None:
        """Close the generator, so that its ``finally`` runs now."""
        close = getattr(self._frames, "close", None)
        if close is not None:
            close()


def check_decoder(decoder: str) -> None:
    """Raise ``SettingsError`` for a decoder that is unknown or not installed."""
    if decoder not in DECODERS:
        raise SettingsError(f"decoder is {decoder!r}; expected one of {', '.join(DECODERS)}")
    if decoder == "pyav":
        from anchorline.runtime.pipeline.av_reader import check_pyav

        check_pyav()


def open_file(item: Item, decoder: Decoder) -> Reader:
    """The reader of an image or video file."""
    if not item.is_video:
        return ImageReader(item.path)
    if decoder == "pyav":
        from anchorline.runtime.pipeline.av_reader import AvReader

        return AvReader(item.path)
    return VideoReader(item.path)


def open_stream(where: str | int, decoder: Decoder, stall: float, name: str, live: bool = True) -> Reader:
    """The reader of a camera or a URL, which gives up when nothing comes for ``stall`` seconds."""
    if decoder == "pyav" and isinstance(where, str):
        from anchorline.runtime.pipeline.av_reader import AvReader

        return AvReader(where, stall=stall, name=name, live=live)
    return StreamReader(where, stall, name, live)
