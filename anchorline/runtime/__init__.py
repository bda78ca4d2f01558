"""The torch-free runtime: from a frame to boxes with NumPy, OpenCV and one exported file.

>>> detector = Detector("model.onnx")
>>> detections = detector(frame)  # BGR uint8 [H, W, 3]
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from anchorline.runtime.contract import Contract
from anchorline.runtime.detections import Detections
from anchorline.runtime.detector import Detector
from anchorline.runtime.drawing import draw
from anchorline.runtime.io.errors import (
    AnchorlineError,
    ArtefactError,
    DataError,
    FrameError,
    GpuError,
    OutputError,
    ParityError,
    SettingsError,
    TrainingError,
)
from anchorline.runtime.io.images import find_images, read_image, write_image
from anchorline.runtime.tensorrt.frames import Nv12
from anchorline.runtime.tensorrt.options import GpuOptions
from anchorline.runtime.video.files import VideoReader, VideoWriter
from anchorline.runtime.video.summary import DetectSummary

if TYPE_CHECKING:
    from anchorline.runtime.tracking import ObjectTracker, TrackOptions
    from anchorline.runtime.video.detection import detect
    from anchorline.runtime.video.frames import Result
    from anchorline.runtime.video.options import Filters
    from anchorline.runtime.video.pipeline import VideoPipeline
    from anchorline.runtime.video.sinks import LatestFrame
    from anchorline.runtime.video.source import Source

# The video pipeline is loaded when one of its names is first used: half of the import's time.
_ON_DEMAND = {
    "Filters": "video.options",
    "LatestFrame": "video.sinks",
    "ObjectTracker": "tracking",
    "Result": "video.frames",
    "Source": "video.source",
    "TrackOptions": "tracking",
    "VideoPipeline": "video.pipeline",
    "detect": "video.detection",
}

__all__ = [
    "AnchorlineError",
    "ArtefactError",
    "Contract",
    "DataError",
    "DetectSummary",
    "Detections",
    "Detector",
    "Filters",
    "FrameError",
    "GpuError",
    "GpuOptions",
    "LatestFrame",
    "Nv12",
    "ObjectTracker",
    "OutputError",
    "ParityError",
    "Result",
    "SettingsError",
    "Source",
    "TrackOptions",
    "TrainingError",
    "VideoPipeline",
    "VideoReader",
    "VideoWriter",
    "detect",
    "draw",
    "find_images",
    "read_image",
    "write_image",
]


def __getattr__(name: str) -> Any:
    if name not in _ON_DEMAND:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_ON_DEMAND[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
