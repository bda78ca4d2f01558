"""Handing a model over to NVIDIA's Triton or DeepStream: a folder that holds all they need.

The names load when they are used: an engine goes to Triton without onnx.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anchorline.deploy.deepstream import deploy_deepstream
    from anchorline.deploy.triton import deploy_triton

_ON_DEMAND = {"deploy_deepstream": "deepstream", "deploy_triton": "triton"}

__all__ = ["deploy_deepstream", "deploy_triton"]


def __getattr__(name: str) -> Any:
    if name not in _ON_DEMAND:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ON_DEMAND[name]}"), name)
