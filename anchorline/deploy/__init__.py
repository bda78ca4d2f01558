"""Handing a model over to NVIDIA's Triton or DeepStream: a folder that holds all they need."""

from anchorline.deploy.deepstream import deploy_deepstream
from anchorline.deploy.triton import deploy_triton

__all__ = ["deploy_deepstream", "deploy_triton"]
