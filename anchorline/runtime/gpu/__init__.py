"""Running an engine on a GPU. Nothing here imports TensorRT or CUDA before an engine is opened.

``tensorrt_backend.py`` is the network for the ``Detector``; ``tensorrt_engine.py`` its plan and contexts;
``tensorrt_lane.py`` one batch's way through it, with the memory of ``lane_buffers.py``, the frames that
``frame_intake.py`` and ``device_frames.py`` read, the kernel of ``preprocess.py`` and the times of
``lane_clock.py``. ``engine_fit.py`` says whether an engine is for this machine at all.
"""
