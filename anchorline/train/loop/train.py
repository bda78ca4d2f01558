"""Train a model: settings and labelled images in, ``RUN/model.safetensors`` out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from anchorline.data.dataset import Dataset
from anchorline.data.slices import sliced
from anchorline.data.summary import DataSummary
from anchorline.runtime.io.errors import DataError, SettingsError
from anchorline.train.alternating import train_alternating
from anchorline.train.loop.distributed import choose_device, is_main, joined_processes, process_count
from anchorline.train.loop.metrics import Report
from anchorline.train.loop.trainer import PhaseConfig, Trainer, TrainResult
from anchorline.train.settings import Settings

# The parts of the model that a schedule of one phase trains.
_PARTS = {
    "joint": ("backbone", "rpn", "roi_heads"),
    "rpn-only": ("backbone", "rpn"),
    "fast-rcnn": ("backbone", "roi_heads"),
}


def train(
    settings: Settings,
    data: Dataset,
    out: Path,
    *,
    validation: Dataset | None = None,
    backbone_weights: Path | str | None = None,
    resume: bool = False,
    device: str = "auto",
    source: Mapping[str, Any] | None = None,
    report: Report | None = None,
    show_data: Callable[[DataSummary], None] | None = None,
    proposals: Path | None = None,
    validation_proposals: Path | None = None,
) -> TrainResult:
    """Train a detector on ``data``, by ``settings.training.regime``, and write the run folder ``out``.

    ``out`` receives ``model.safetensors`` (the best by mAP50 where ``validation`` is given, else the
    latest), ``last/`` (the state of the last full epoch, from which ``resume`` goes on),
    ``metrics.csv``, ``settings.json``, ``data.json`` and ``samples.png``. Ctrl-C saves the weights
    and returns. ``backbone_weights`` is a file, or ``"imagenet"`` for torchvision's own weights.
    ``show_data`` is called once, when all is checked and the training begins. ``proposals`` is the
    file of stored ones that ``fast-rcnn`` trains on, ``validation_proposals`` the one it is validated
    with (without it, it is not). Raises ``TrainingError`` for a loss that is not finite, naming the
    images; the last good checkpoint stays.

    Started by torchrun, the processes train one model together (``distributed.joined_processes``): all
    return the same, the main one alone reports and writes. ``training.batch`` images are those of all of
    them.
    """
    regime = settings.training.regime
    with joined_processes(device):
        check_data(data, validation)
        check_processes(data, settings.training.batch, process_count())
        if regime == "fast-rcnn" and proposals is None:
            raise SettingsError(
                "schedule 'fast-rcnn' trains on stored proposals and none are given; expected --proposals "
                "FILE, as anchorline proposals writes it"
            )
        if regime != "fast-rcnn" and (proposals is not None or validation_proposals is not None):
            raise SettingsError(
                f"stored proposals are given, and schedule {regime!r} makes its own; "
                "expected them with --schedule fast-rcnn only"
            )
        if validation_proposals is not None and validation is None:
            raise SettingsError(
                f"{validation_proposals}: proposals for validation are given without validation data; "
                "expected --val SPEC with --val-proposals"
            )
        if settings.training.slices is not None and proposals is not None:
            raise SettingsError(
                "training.slice is given with stored proposals, which are those of whole images; leave out "
                "one of them"
            )
        if settings.training.slices is not None:
            training = settings.training
            rule = (training.slice, training.slice_overlap, training.min_visible, training.empty_slices)
            data = sliced(data, *rule, seed=training.seed)
        phase = PhaseConfig(
            settings=settings,
            data=data,
            device=choose_device(device),
            folder=out,
            checkpoint=out / "model.safetensors",
            epochs=settings.training.epochs,
            proposals=proposals,
            backbone_weights=backbone_weights,
            parts=_PARTS.get(regime, ()),
            validation=validation,
            validation_proposals=validation_proposals,
            source=source or {},
            report=report if is_main() else None,
        )
        if regime == "alternating":
            return train_alternating(phase, resume, show_data)
        trainer = Trainer(phase, resume)
        trainer.begin(out, show_data)
        return trainer.run()


def check_data(data: Dataset, validation: Dataset | None) -> None:
    """Raise ``DataError`` unless there is something to learn, and to measure in the classes learnt."""
    for each, use in ((data, "train on"), (validation, "validate with")):
        if each is not None:
            each.check_objects(use)
    if validation is not None and (unknown := sorted(set(validation.names) - set(data.names))):
        raise DataError(
            f"{validation.spec}: has the class {unknown[0]!r}, {data.spec} has only "
            f"{', '.join(data.names)}; validate with data of the trained classes"
        )


def check_processes(data: Dataset, batch: int, processes: int) -> None:
    """Raise ``SettingsError`` where one of several processes would have no image in a batch or an epoch."""
    if processes > 1 and batch < processes:
        raise SettingsError(
            f"training.batch is {batch}, which {processes} processes share; expected one image for each at "
            f"least: training.batch={processes}, or --nproc-per-node {batch}"
        )
    if processes > 1 and len(data) < processes:
        raise SettingsError(
            f"{data.spec}: has {len(data)} images for {processes} processes; expected at least one for each: "
            f"--nproc-per-node {len(data)}"
        )
