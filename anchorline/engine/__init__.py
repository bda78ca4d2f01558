"""ONNX to TensorRT: precision, lowering, the builder. Its names load when they are used."""

from typing import TYPE_CHECKING

from anchorline.runtime.on_demand import on_demand

if TYPE_CHECKING:
    from anchorline.engine.build import BuildResult as BuildResult
    from anchorline.engine.build import build_engine as build_engine
    from anchorline.engine.options import BuildOptions as BuildOptions

__all__, __getattr__, __dir__ = on_demand(
    __name__, {"build": "BuildResult build_engine", "options": "BuildOptions"}
)
