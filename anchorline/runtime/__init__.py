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
from anchorline.runtime.errors import (
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
from anchorline.runtime.gpu.device_frames import Nv12
from anchorline.runtime.gpu.options import GpuOptions
from anchorline.runtime.images import find_images, read_image, write_image
from anchorline.runtime.summary import DetectSummary
from anchorline.runtime.video import VideoReader, VideoWriter

if TYPE_CHECKING:
    from anchorline.runtime.detecting import detect
    from anchorline.runtime.pipeline.filters import Filters
    from anchorline.runtime.pipeline.frames import Result
    from anchorline.runtime.pipeline.sinks import LatestFrame
    from anchorline.runtime.pipeline.source import Source
    from anchorline.runtime.pipeline.video_pipeline import VideoPipeline
    from anchorline.runtime.tracking import ObjectTracker, TrackOptions

# The video pipeline is loaded when one of its names is first used: half of the import's time.
_ON_DEMAND = {
    "Filters": "pipeline.filters",
    "LatestFrame": "pipeline.sinks",
    "ObjectTracker": "tracking",
    "Result": "pipeline.frames",
    "Source": "pipeline.source",
    "TrackOptions": "tracking",
    "VideoPipeline": "pipeline.video_pipeline",
    "detect": "detecting",
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
