"""What all runs have in common, data and architecture, and the settings of each."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from anchorline.data.boxes import box_areas
from anchorline.data.dataset import Dataset, load_dataset
from anchorline.runtime.canvas import boxes_to_canvas, place
from anchorline.runtime.contract import ResizeRule
from anchorline.runtime.io.errors import SettingsError
from anchorline.runtime.io.files import sha256_of
from anchorline.train.loop.distributed import choose_device
from anchorline.train.loop.trainer import steps_of_epoch
from anchorline.train.model.settings import ModelSettings
from anchorline.train.settings import Settings, load_preset
from paper_experiments.runs import ANCHORS, BASE_LAMBDA, TEST_PROPOSALS, Run

DEFAULT_PRESET = "mobilenet-v2-stride16"
# What makes the default preset affordable on two cores; conv1 and conv2 of VGG are fixed in the paper too.
AFFORDABLE = ("model.canvas=[288, 384]", "training.frozen_stages=2")
RATIOS = (0.5, 1.0, 2.0)
# One map of stride 16; 6000 candidates and 300 proposals in test; equation (1) as it stands in the paper.
PAPER = (
    "model.neck=single",
    "model.rpn_pre_nms=6000",
    f"model.rpn_post_nms={TEST_PROPOSALS}",
    "model.rpn_nms_iou=0.7",
    "training.rpn_normalisation=paper",
    "training.rpn_samples=256",
    "training.rpn_box_beta=1.0",
)
SHARED_DATA, SHARED_WEIGHTS = "data/bccd", "weights/mobilenet_v2_imagenet_features.pth"


@dataclass(frozen=True)
class Study:
    """Data, splits, architecture and weights of all runs; ``scales`` are in pixels of the canvas.

    ``search`` is a file of stored selective-search proposals, or None; ``no_search`` then says why there is
    no selective search, and is empty where OpenCV's can make them.
    """

    train_data: Dataset
    test_data: Dataset
    preset: str
    overrides: tuple[str, ...]
    scales: tuple[float, float, float]
    step_shares: tuple[float, ...]
    weights: Path | str | None
    device: torch.device
    search: Path | None = None
    no_search: str = ""

    def settings(self, run: Run, epochs: int) -> Settings:
        """The settings of a run that trains for ``epochs`` passes over the data."""
        scales, ratios = ANCHORS.get(run.variant, (3, 3))
        sizes = self.scales if scales == 3 else self.scales[1:2]
        weight = run.variant if run.experiment == "lambda" else BASE_LAMBDA
        regimes = {"alternating": "alternating", "one-stage": "fast-rcnn", "selective-search": "fast-rcnn"}
        own = [
            f"model.anchor_sizes={[list(sizes)]}",
            f"model.aspect_ratios={list(RATIOS if ratios == 3 else RATIOS[1:2])}",
            f"training.rpn_box_loss_weight={weight}",
            f"training.regime={regimes.get(run.experiment, 'joint')}",
            f"training.step_shares={list(self.step_shares)}",
            f"training.epochs={epochs}",
            f"training.seed={run.seed}",
        ]
        settings = load_preset(self.preset, [*base_overrides(self.preset), *own, *self.overrides])
        # Half an epoch at most: a step of alternating training may have no more than one.
        steps = max(
            1, min(settings.training.warmup_steps, steps_of_epoch(len(self.train_data), settings) // 2)
        )
        if not settings.training.warmup_steps:
            return settings
        return dataclasses.replace(
            settings, training=dataclasses.replace(settings.training, warmup_steps=steps)
        )

    @property
    def model(self) -> ModelSettings:
        """The architecture with all nine anchors."""
        return self.settings(Run("joint", 0), 4).model

    def describe(self) -> dict[str, Any]:
        """What the plan keeps, and a later sitting has to agree with."""
        settings = self.settings(Run("joint", 0), 4).to_dict()
        for name in ("epochs", "seed"):
            del settings["training"][name]
        return {
            "data": [self.train_data.spec, self.test_data.spec],
            "classes": list(self.train_data.names),
            "images": [len(self.train_data), len(self.test_data)],
            "preset": self.preset,
            "settings": json.loads(json.dumps(settings)),
            "weights": str(self.weights) if self.weights else None,
            "device": self.device.type,
            "selective_search": str(self.search) if self.search else self.no_search or "OpenCV",
        }

    def key(self, run: Run, epochs: int, needed: Sequence[str]) -> str:
        """A hash of all that decides a run's figures; ``needed`` are those of the runs it builds on."""
        content = {
            **self.describe(),
            "run": dataclasses.asdict(run),
            "settings": self.settings(run, epochs).to_dict(),
            "weights_sha256": sha256_of(self.weights) if isinstance(self.weights, Path) else self.weights,
            "needed": list(needed),
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def base_overrides(preset: str) -> tuple[str, ...]:
    return (*(AFFORDABLE if preset == DEFAULT_PRESET else ()), *PAPER)


def open_study(options: Any) -> Study:
    """The study that the command's options ask for; raises ``AnchorlineError`` for what does not fit."""
    data = options.data or _shared_data()
    train_data = load_dataset(f"{data}@{options.train_split}")
    test_data = load_dataset(f"{data}@{options.test_split}", names=train_data.names)
    overrides = tuple(options.overrides)
    # One size, to read canvas and resize rule; the scales are not known yet.
    first = ["model.anchor_sizes=[[64.0]]", *overrides]
    model = load_preset(options.preset, [*base_overrides(options.preset), *first]).model
    if options.selective_search is not None and not options.selective_search.is_file():
        raise SettingsError(
            f"--selective-search {options.selective_search}: no such file; see anchorline proposals"
        )
    return Study(
        train_data=train_data,
        test_data=test_data,
        preset=options.preset,
        overrides=overrides,
        scales=_scales(options.scales, train_data, model),
        step_shares=tuple(options.step_shares),
        weights=_weights(options.backbone_weights, model),
        device=choose_device(options.device),
        search=options.selective_search,
        no_search=_why_no_search(options.selective_search),
    )


def fitted_scales(data: Dataset, model: ModelSettings) -> tuple[float, float, float]:
    """The 5 % and 95 % points of the objects' sizes on the canvas, and the geometric mean of both.

    A size is the square root of the box's area in canvas pixels.
    """
    rule = ResizeRule(model.shorter_side or None, model.longer_side or None)
    sizes = [np.zeros(0)]
    for image in data:
        boxes = image.boxes[~(image.difficult | image.crowd)]
        sizes.append(np.sqrt(box_areas(boxes_to_canvas(boxes, place(image.size, model.canvas, rule)))))
    joined = np.concatenate(sizes)
    if not len(joined):
        raise SettingsError(f"{data.spec}: holds no object to fit anchor scales to; expected --scales A B C")
    small, large = np.percentile(joined, (5, 95))
    middle = float(np.sqrt(small * large))
    return (_whole(float(small)), _whole(middle), _whole(float(large)))


def _whole(pixels: float) -> float:
    return float(max(1, round(pixels)))


def _scales(given: Sequence[str], data: Dataset, model: ModelSettings) -> tuple[float, float, float]:
    if list(given) == ["auto"]:
        return fitted_scales(data, model)
    try:
        small, middle, large = map(float, given)
    except ValueError:
        small = middle = large = 0.0
    if not 0 < small < middle < large < float("inf"):
        raise SettingsError(
            f"--scales {' '.join(given)}: expected auto, or three rising sizes in canvas pixels"
        )
    return small, middle, large


def _shared_data() -> str:
    folder = Path(os.environ.get("ANCHORLINE_SHARED", "")) / SHARED_DATA
    if "ANCHORLINE_SHARED" not in os.environ or not folder.is_dir():
        raise SettingsError(
            f"no --data given, and ANCHORLINE_SHARED is {os.environ.get('ANCHORLINE_SHARED')!r}; expected a "
            f"folder with {SHARED_DATA}, or --data voc:DIR"
        )
    return f"voc:{folder}"


def _weights(given: str, model: ModelSettings) -> Path | str | None:
    """The weights that ``--backbone-weights`` names; ``auto`` is the shared file where it fits, else none."""
    if given == "auto":
        shared = Path(os.environ.get("ANCHORLINE_SHARED", "")) / SHARED_WEIGHTS
        fits = model.backbone == "mobilenet_v2" and "ANCHORLINE_SHARED" in os.environ and shared.is_file()
        return shared if fits else None
    if given in ("none", "imagenet"):
        return None if given == "none" else given
    if not Path(given).is_file():
        raise SettingsError(
            f"--backbone-weights {given}: no such file; expected a file, imagenet, auto or none"
        )
    return Path(given)


def _why_no_search(given: Path | None) -> str:
    if given is not None or hasattr(cv2, "ximgproc"):
        return ""
    return "not run: OpenCV here has no contrib build (ximgproc), and no --selective-search FILE was given"
