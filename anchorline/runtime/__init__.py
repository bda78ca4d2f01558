"""The torch-free runtime: from a frame to boxes with NumPy, OpenCV and one exported file.

>>> detector = Detector("model.onnx")
>>> detections = detector(frame)  # BGR uint8 [H, W, 3]
"""

from typing import TYPE_CHECKING

from anchorline.runtime.on_demand import on_demand

if TYPE_CHECKING:
    from anchorline.runtime.contract import Contract as Contract
    from anchorline.runtime.detections import Detections as Detections
    from anchorline.runtime.detector import Detector as Detector
    from anchorline.runtime.drawing import draw as draw
    from anchorline.runtime.io.errors import AnchorlineError as AnchorlineError
    from anchorline.runtime.io.errors import ArtefactError as ArtefactError
    from anchorline.runtime.io.errors import DataError as DataError
    from anchorline.runtime.io.errors import FrameError as FrameError
    from anchorline.runtime.io.errors import GpuError as GpuError
    from anchorline.runtime.io.errors import OutputError as OutputError
    from anchorline.runtime.io.errors import ParityError as ParityError
    from anchorline.runtime.io.errors import SettingsError as SettingsError
    from anchorline.runtime.io.errors import TrainingError as TrainingError
    from anchorline.runtime.io.images import find_images as find_images
    from anchorline.runtime.io.images import read_image as read_image
    from anchorline.runtime.io.images import write_image as write_image
    from anchorline.runtime.nv12 import Nv12 as Nv12
    from anchorline.runtime.tensorrt.cuda import GpuOptions as GpuOptions
    from anchorline.runtime.video.figures import DetectSummary as DetectSummary
    from anchorline.runtime.video.frames import Result as Result
    from anchorline.runtime.video.options import DetectOptions as DetectOptions
    from anchorline.runtime.video.options import Filters as Filters
    from anchorline.runtime.video.options import SliceOptions as SliceOptions
    from anchorline.runtime.video.options import TrackOptions as TrackOptions
    from anchorline.runtime.video.pipeline import VideoPipeline as VideoPipeline
    from anchorline.runtime.video.pipeline import detect as detect
    from anchorline.runtime.video.reader import VideoReader as VideoReader
    from anchorline.runtime.video.sinks import LatestFrame as LatestFrame
    from anchorline.runtime.video.source import Source as Source
    from anchorline.runtime.video.tracks import ObjectTracker as ObjectTracker
    from anchorline.runtime.video.writer import VideoWriter as VideoWriter

# The command needs the options and errors at once, and NumPy and OpenCV only where a verb works with frames.
__all__, __getattr__, __dir__ = on_demand(
    __name__,
    {
        "nv12": "Nv12",
        "contract": "Contract",
        "detections": "Detections",
        "detector": "Detector",
        "drawing": "draw",
        "io.errors": "AnchorlineError ArtefactError DataError FrameError GpuError OutputError ParityError "
        "SettingsError TrainingError",
        "io.images": "find_images read_image write_image",
        "tensorrt.cuda": "GpuOptions",
        "video.figures": "DetectSummary",
        "video.frames": "Result",
        "video.options": "DetectOptions Filters SliceOptions TrackOptions",
        "video.pipeline": "VideoPipeline detect",
        "video.reader": "VideoReader",
        "video.sinks": "LatestFrame",
        "video.source": "Source",
        "video.tracks": "ObjectTracker",
        "video.writer": "VideoWriter",
    },
)
