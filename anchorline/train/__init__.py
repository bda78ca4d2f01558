"""Training: labelled images in, a ``model.safetensors`` out.

>>> settings = load_preset("mobilenet-v2-fpn-quick", ["training.epochs=20"])
>>> result = train(settings, load_dataset("yolo:DIR"), Path("run"))  # anchorline.data.load_dataset
>>> detector = TorchDetector.load(result.checkpoint)

Each name is loaded when it is first used: importing this needs no PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anchorline.train.checkpoint import load_checkpoint
    from anchorline.train.loop.metrics import StepReport, training_progress
    from anchorline.train.loop.train import train
    from anchorline.train.loop.trainer import TrainResult
    from anchorline.train.predict import TorchDetector
    from anchorline.train.settings import Settings, load_preset, preset_names

_ON_DEMAND = {
    "Settings": "settings",
    "StepReport": "loop.metrics",
    "TorchDetector": "predict",
    "TrainResult": "loop.trainer",
    "load_checkpoint": "checkpoint",
    "load_preset": "settings",
    "preset_names": "settings",
    "train": "loop.train",
    "training_progress": "loop.metrics",
}

__all__ = [
    "Settings",
    "StepReport",
    "TorchDetector",
    "TrainResult",
    "load_checkpoint",
    "load_preset",
    "preset_names",
    "train",
    "training_progress",
]


def __getattr__(name: str) -> Any:
    if name not in _ON_DEMAND:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ON_DEMAND[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
