"""Detect in a video in ten lines: python examples/video_app.py model.engine video.mp4"""

import sys

from anchorline.runtime import Detector, VideoReader

with Detector(sys.argv[1]) as detector, VideoReader(sys.argv[2]) as video:
    frames = (frame for _, _, frame in video)
    for number, detections in enumerate(detector.stream(frames, in_flight=2)):
        sure = detections[detections.scores > 0.5]
        print(number, ", ".join(sure.names) or "nothing")
