"""Labelled data: VOC, COCO, YOLO, generated scenes and videos. Never imports PyTorch."""

from anchorline.data.dataset import Dataset, LabelledImage, load_dataset, load_datasets

__all__ = ["Dataset", "LabelledImage", "load_dataset", "load_datasets"]
