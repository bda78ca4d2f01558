"""Anchorline: Faster R-CNN from PyTorch training to real-time video."""

__version__ = "0.1.0"
