"""Running an engine on a GPU. Nothing here imports TensorRT or CUDA before an engine is opened.

``backend.py`` is the network for the ``Detector``; ``engine.py`` its plan, its contexts, whether it is for
this machine at all; ``lane.py`` one batch's way through it, with its memory and its times, the frames that
``frame_intake.py`` and ``frames.py`` read, and the kernel of ``preprocess.py``.
"""
