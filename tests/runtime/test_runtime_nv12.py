"""NV12 frames and their colours: against ITU-R's formulas, FFmpeg, and streams that state them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from anchorline.runtime.io.errors import FrameError
from anchorline.runtime.nv12 import COLOURS, Nv12, bgr_of
from anchorline.runtime.video.reader import AvReader, VideoReader

SIZE = (48, 64)
MATRICES = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722)}  # K_r and K_b, ITU-R BT.601-7 and BT.709-6
AV_MATRIX, AV_RANGE = {"bt601": 5, "bt709": 1}, {False: 1, True: 2}  # FFmpeg's AVColorSpace and AVColorRange
EVERY = [(matrix, full) for matrix in MATRICES for full in (False, True)]


def noise(size: tuple[int, int] = SIZE) -> NDArray[np.uint8]:
    """Every luma beside every chroma."""
    return np.random.default_rng(0).integers(0, 256, (size[0] * 3 // 2, size[1]), dtype=np.uint8)


def by_the_standard(pixels: NDArray[np.uint8], matrix: str, full: bool) -> NDArray[np.float64]:
    """Grey levels in real numbers, clipped."""
    kr, kb = MATRICES[matrix]
    height = len(pixels) * 2 // 3
    black, luma_range, chroma_range = (0, 255, 255) if full else (16, 219, 224)
    luma = np.maximum(pixels[:height].astype(np.float64) - black, 0) / luma_range
    chroma = (pixels[height:].astype(np.float64) - 128) / chroma_range
    blue, red = (np.kron(chroma[:, place::2], np.ones((2, 2))) for place in (0, 1))
    r, b = luma + 2 * (1 - kr) * red, luma + 2 * (1 - kb) * blue
    g = (luma - kr * r - kb * b) / (1 - kr - kb)
    return np.clip(255 * np.stack([b, g, r], axis=-1), 0, 255)


@pytest.mark.parametrize(("matrix", "full"), EVERY)
def test_the_colours_are_the_standard_s(matrix: str, full: bool) -> None:
    found = bgr_of(Nv12(noise(), matrix, full)).astype(np.float64)
    # Rounded; OpenCV's factors for BT.601 have three decimals.
    most = 1.0 if (matrix, full) == ("bt601", False) else 0.5001
    assert np.abs(found - by_the_standard(noise(), matrix, full)).max() <= most


def test_without_a_word_it_is_opencv_s_conversion() -> None:
    expected = cv2.cvtColor(noise(), cv2.COLOR_YUV2BGR_NV12)
    np.testing.assert_array_equal(bgr_of(Nv12(noise())), expected)


@pytest.mark.parametrize("colours", COLOURS)
def test_the_sums_stay_in_32_bits(colours: str) -> None:
    yuv = COLOURS[colours]
    chroma = 128 * max(abs(yuv.u_to_b), abs(yuv.v_to_r), abs(yuv.u_to_g) + abs(yuv.v_to_g))
    assert 255 * yuv.luma + (1 << 19) + chroma < 2**31


@pytest.mark.parametrize("given", [{"matrix": "bt2020"}, {"matrix": None}, {"full_range": 1}])
def test_other_colours_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(FrameError, match=r"expected one of bt601, bt709|expected True or False"):
        Nv12(noise(), **given)


def clip(matrix: int, colour_range: int) -> io.BytesIO:
    """A video whose stream states its colours; of large patches, which survive compression."""
    av = pytest.importorskip("av")
    if "libx264" not in av.codecs_available:
        pytest.skip("needs an FFmpeg that writes H.264")
    pixels = np.empty((SIZE[0] * 3 // 2, SIZE[1]), np.uint8)
    pixels[: SIZE[0]], pixels[SIZE[0] :, ::2], pixels[SIZE[0] :, 1::2] = 100, 90, 200
    pixels[: SIZE[0] // 2] = 180
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=10, options={"qp": "0"})
        stream.height, stream.width, stream.pix_fmt = *SIZE, "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, colour_range
        frame = av.VideoFrame.from_ndarray(pixels, format="nv12")
        frame.colorspace, frame.color_range = matrix, colour_range
        output.mux([*stream.encode(frame), *stream.encode()])
    buffer.seek(0)
    return buffer


def decoded(matrix: int, colour_range: int) -> Any:
    import av

    with av.open(clip(matrix, colour_range)) as container:
        return next(container.decode(video=0))


@pytest.mark.parametrize(("matrix", "full"), EVERY)
def test_a_stream_tells_its_colours(matrix: str, full: bool) -> None:
    """And FFmpeg, which reads them as well, makes of its frame what we do, up to its own rounding."""
    frame = decoded(AV_MATRIX[matrix], AV_RANGE[full])
    found = Nv12.of_video_frame(frame)
    assert (found.matrix, found.full_range) == (matrix, full)
    theirs = frame.to_ndarray(format="bgr24").astype(int)
    assert np.abs(bgr_of(found).astype(int) - theirs).max() <= 3
    other = Nv12(found.pixels, "bt601" if matrix == "bt709" else "bt709", full)
    assert np.abs(bgr_of(other).astype(int) - theirs).max() > 5


def test_a_stream_that_tells_nothing_is_bt601() -> None:
    found = Nv12.of_video_frame(decoded(2, 0))
    assert (found.matrix, found.full_range) == ("bt601", False)


def test_colours_that_are_not_known_are_refused() -> None:
    frame = decoded(9, 1)
    with pytest.raises(FrameError, match=r"number 9 of FFmpeg's; expected BT\.601 or BT\.709"):
        Nv12.of_video_frame(frame)


@pytest.mark.parametrize("reader", [AvReader, VideoReader])
@pytest.mark.parametrize(("matrix", "full"), EVERY)
def test_a_video_is_read_in_the_colours_it_states(
    matrix: str, full: bool, reader: Any, tmp_path: Path
) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(clip(AV_MATRIX[matrix], AV_RANGE[full]).getvalue())
    with reader(path) as opened:
        ((_, _, frame),) = opened
    expected = bgr_of(Nv12.of_video_frame(decoded(AV_MATRIX[matrix], AV_RANGE[full])))
    assert np.abs(frame.astype(int) - expected.astype(int)).max() <= 3
