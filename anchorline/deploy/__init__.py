"""Handing a model over to NVIDIA's Triton or DeepStream: a folder that holds all they need.

The names load when they are used: an engine goes to Triton without onnx.
"""

from typing import TYPE_CHECKING

from anchorline.runtime.on_demand import on_demand

if TYPE_CHECKING:
    from anchorline.deploy.deepstream import deploy_deepstream as deploy_deepstream
    from anchorline.deploy.triton import deploy_triton as deploy_triton

__all__, __getattr__, __dir__ = on_demand(
    __name__, {"deepstream": "deploy_deepstream", "triton": "deploy_triton"}
)
