"""Training: labelled images in, a ``model.safetensors`` out.

>>> settings = load_preset("mobilenet-v2-fpn-quick", ["training.epochs=20"])
>>> result = train(settings, load_dataset("yolo:DIR"), Path("run"))  # anchorline.data.load_dataset
>>> detector = TorchDetector.load(result.checkpoint)

Each name is loaded when it is first used: importing this needs no PyTorch.
"""

from typing import TYPE_CHECKING

from anchorline.runtime.on_demand import on_demand

if TYPE_CHECKING:
    from anchorline.train.checkpoint import load_checkpoint as load_checkpoint
    from anchorline.train.loop.metrics import StepReport as StepReport
    from anchorline.train.loop.metrics import training_progress as training_progress
    from anchorline.train.loop.train import train as train
    from anchorline.train.loop.trainer import TrainResult as TrainResult
    from anchorline.train.predict import TorchDetector as TorchDetector
    from anchorline.train.settings import Settings as Settings
    from anchorline.train.settings import load_preset as load_preset
    from anchorline.train.settings import preset_names as preset_names

__all__, __getattr__, __dir__ = on_demand(
    __name__,
    {
        "checkpoint": "load_checkpoint",
        "loop.metrics": "StepReport training_progress",
        "loop.train": "train",
        "loop.trainer": "TrainResult",
        "predict": "TorchDetector",
        "settings": "Settings load_preset preset_names",
    },
)
