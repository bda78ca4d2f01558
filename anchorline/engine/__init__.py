"""ONNX to TensorRT: precision, lowering, the builder. Its names load when they are used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anchorline.engine.build import BuildResult, build_engine
    from anchorline.engine.options import BuildOptions

_ON_DEMAND = {"BuildOptions": "options", "BuildResult": "build", "build_engine": "build"}

__all__ = ["BuildOptions", "BuildResult", "build_engine"]


def __getattr__(name: str) -> Any:
    if name not in _ON_DEMAND:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ON_DEMAND[name]}"), name)
