"""Running an engine on a GPU. Nothing here imports TensorRT or CUDA before an engine is opened.

``manifest.py`` says what an engine is and whether it is for this machine; ``engine.py`` is its plan and its
contexts; ``lane.py`` the backend of the ``Detector`` and one batch's way through it, with its memory and its
times; ``frames.py`` what becomes of its frames.
"""
