"""The torch-free runtime: from a frame to boxes with NumPy, OpenCV and one exported file.

>>> detector = Detector("model.onnx")
>>> detections = detector(frame)  # BGR uint8 [H, W, 3]
"""

from anchorline.runtime.contract import Contract
from anchorline.runtime.detecting import detect
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
from anchorline.runtime.pipeline.filters import Filters
from anchorline.runtime.pipeline.frames import Result
from anchorline.runtime.pipeline.sinks import LatestFrame
from anchorline.runtime.pipeline.source import Source
from anchorline.runtime.pipeline.video_pipeline import VideoPipeline
from anchorline.runtime.summary import DetectSummary
from anchorline.runtime.video import VideoReader, VideoWriter

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
    "OutputError",
    "ParityError",
    "Result",
    "SettingsError",
    "Source",
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
