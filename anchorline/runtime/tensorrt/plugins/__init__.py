"""The custom ops as TensorRT plugins: ``anchorline::BatchedNMS`` and ``anchorline::RoIPool``.

An op (``ops.py``) says in plain Python what its output looks like and which
kernels compute it; ``adapter.py`` makes a TensorRT plugin of it, for TensorRT and TensorRT for RTX;
``driver.py`` launches the kernels, compiled ahead and packed in ``kernels/kernels.zip``, on the GPU.

Register them before an engine that holds them is built or loaded: ``register_plugins(tensorrt)``.
Nothing here imports TensorRT or CUDA before it is used, and building an engine never does use CUDA.
"""

from __future__ import annotations

from anchorline.runtime.tensorrt.plugins.adapter import (
    PLUGIN_NAMESPACE,
    PLUGIN_VERSION,
    PLUGINS,
    register_plugins,
)

__all__ = ["PLUGINS", "PLUGIN_NAMESPACE", "PLUGIN_VERSION", "register_plugins"]
