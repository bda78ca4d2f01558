"""Train a model: settings and labelled images in, ``RUN/model.safetensors`` out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anchorline.data.dataset import Dataset
from anchorline.data.summary import DataSummary
from anchorline.train.alternating import train_alternating
from anchorline.train.loop.distributed import is_main, process_count
from anchorline.train.loop.job import Job
from anchorline.train.loop.launch import joined_processes
from anchorline.train.loop.run_checks import check_data, check_processes, check_proposals, choose_device
from anchorline.train.loop.trainer import PhaseResult, Plan, Report, StepReport, detection_losses, rpn_losses
from anchorline.train.settings import Settings

__all__ = ["Report", "StepReport", "TrainResult", "train"]


@dataclass(frozen=True)
class TrainResult:
    """Where the best checkpoint lies, and its mAP50 on the validation data (None without any).

    ``recall`` is that of an RPN trained alone: of the validation's objects by its proposals, at IoU 0.5.
    """

    checkpoint: Path
    steps: int
    map50: float | None
    interrupted: bool = False
    recall: float | None = None


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

    Started by torchrun, the processes train one model together (``launch.joined_processes``): all return
    the same, the main one alone reports and writes. ``training.batch`` images are those of all of them.
    """
    regime = settings.training.regime
    with joined_processes(device):
        check_data(data, validation)
        check_processes(data, settings.training.batch, process_count())
        check_proposals(regime, proposals, validation is not None, validation_proposals)
        job = Job(
            *(settings, data, out, validation, choose_device(device), dict(source or {})),
            *(backbone_weights, report if is_main() else None, show_data, proposals, validation_proposals),
        )
        result = train_alternating(job, resume) if regime == "alternating" else _train_at_once(job, resume)
    best = {"recall" if regime == "rpn-only" else "map50": result.best}
    return TrainResult(
        result.checkpoint, result.steps, best.get("map50"), result.interrupted, best.get("recall")
    )


def _train_at_once(job: Job, resume: bool) -> PhaseResult:
    """The schedules of one phase: joint, the RPN alone, the detection head alone."""
    regime, folder = job.settings.training.regime, job.out
    plan = Plan(folder, folder / "model.safetensors", job.settings.training.epochs)
    task = "detections"
    if regime == "rpn-only":
        task, parts = "proposals", ("backbone", "rpn")
        plan = dataclasses.replace(plan, losses=rpn_losses, parts=parts, metric="recall50")
    elif regime == "fast-rcnn":
        parts = ("backbone", "roi_heads")
        plan = dataclasses.replace(plan, losses=detection_losses, parts=parts, needs_proposals=True)
    phase = job.phase(plan, task, None if resume else job.pretrained(), job.proposals)
    if resume:
        phase.resume()
    job.begin(phase)
    return phase.train(job.report)
