"""Frames that are on the GPU already, from PyTorch or pycuda: python examples/gpu_frames.py model.engine

They are read where they lie: nothing goes over the host, and the network waits for whatever still writes
them. A frame is uint8 BGR [H, W, 3]; it must not change until its detections have come.
"""

import sys

import numpy as np

from anchorline.runtime import Detector

FRAME = np.random.default_rng(0).integers(0, 256, (1080, 1920, 3), dtype=np.uint8)


def from_pytorch(model: str) -> None:
    """A tensor is taken through DLPack, by which PyTorch makes our stream wait for its own."""
    import torch

    frame = torch.from_numpy(FRAME).cuda()
    brighter = (frame.float() * 1.2).clamp(0, 255).to(torch.uint8)
    with Detector(model) as detector:
        print("PyTorch:", len(detector(brighter)), "found")
        # Or on a stream of the program's own:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            darker = (frame.float() * 0.8).to(torch.uint8)
        print("PyTorch, own stream:", len(detector(darker, stream=stream)), "found")


def from_pycuda(model: str) -> None:
    """``autoprimaryctx``, not ``autoinit``: its context is the one that everybody else uses as well."""
    import pycuda.autoprimaryctx  # noqa: F401
    from pycuda import driver, gpuarray

    stream = driver.Stream()
    frame = gpuarray.to_gpu_async(FRAME, stream=stream)
    with Detector(model) as detector:
        print("pycuda:", len(detector(frame, stream=stream)), "found")


if __name__ == "__main__":
    for source in (from_pytorch, from_pycuda):
        try:
            source(sys.argv[1])
        except ImportError as error:
            print(f"{source.__name__}: left out ({error})")
