"""Training one run to its end or the budget's; a later sitting goes on from the last full epoch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from anchorline.data.dataset import Dataset
from anchorline.data.proposals import SelectiveSearch, write_proposals
from anchorline.evaluation.evaluation import run_detector
from anchorline.runtime.detections import Detections
from anchorline.runtime.io.files import write_json
from anchorline.train.alternating import FINISHED
from anchorline.train.loop.metrics import Report, StepReport
from anchorline.train.loop.train import train
from anchorline.train.loop.trainer import STATE_FILE, PhaseConfig, TrainResult
from paper_experiments.clock import BudgetSpent, Clock
from paper_experiments.proposals import DenseTrainer
from paper_experiments.runs import SELECTIVE_SEARCH, Run
from paper_experiments.study import Study

TRAINED = "trained.json"


@dataclass(frozen=True)
class Trained:
    """Where a run's models lie, and the seconds that their training took in all sittings."""

    folder: Path
    seconds: float

    @property
    def is_there(self) -> bool:
        return (self.folder / TRAINED).is_file()

    @property
    def model(self) -> Path:
        return self.folder / "model.safetensors"

    def step(self, number: int) -> Path:
        """The model of step 1 or 2 of an alternating training."""
        return self.folder / f"step-{number}" / "model.safetensors"


def train_run(study: Study, run: Run, epochs: int, folder: Path, clock: Clock) -> Trained:
    """Train what ``run`` asks for into ``folder``, or take what an earlier sitting has finished.

    Raises ``BudgetSpent``, or ``KeyboardInterrupt`` for the user's own.
    """
    mark = folder / TRAINED
    if mark.is_file():
        return Trained(folder, float(json.loads(mark.read_text(encoding="utf-8"))["seconds"]))
    clock.count()

    def report(_: StepReport) -> None:
        clock.tick(run.name)

    result = (_train_dense if run.experiment == "one-stage" else _train)(
        study, run, epochs, folder, report, clock
    )
    if result.interrupted:
        clock.note()
        raise BudgetSpent if clock.is_spent else KeyboardInterrupt
    clock.note()
    write_json(mark, {"seconds": clock.of_run(run.name)})
    return Trained(folder, clock.of_run(run.name))


def search_proposals(study: Study, folder: Path, clock: Clock) -> tuple[Path, Path]:
    """Files of selective search's proposals for the training and test images, made where none is given."""
    if study.search is not None:
        return study.search, study.search
    paths = (folder / "selective-search-train.jsonl", folder / "selective-search-test.jsonl")
    for path, data in zip(paths, (study.train_data, study.test_data), strict=True):
        if not path.is_file():
            write_proposals(path, data, _searched(data, clock))
    return paths


def _searched(data: Dataset, clock: Clock) -> Iterator[Detections]:
    for each in run_detector(SelectiveSearch(SELECTIVE_SEARCH).batch, data):
        clock.check()
        yield each


def _train(study: Study, run: Run, epochs: int, folder: Path, report: Report, clock: Clock) -> TrainResult:
    proposals = None
    if run.experiment == "selective-search":
        proposals = search_proposals(study, folder.parent, clock)[0]
    return train(
        study.settings(run, epochs),
        study.train_data,
        folder,
        backbone_weights=study.weights,
        resume=_can_resume(folder),
        device=study.device.type,
        source={"command": f"benchmarks/paper.py, {run.name}"},
        report=report,
        proposals=proposals,
    )


def _train_dense(
    study: Study, run: Run, epochs: int, folder: Path, report: Report, clock: Clock
) -> TrainResult:
    """Fast R-CNN on dense windows, which are made on the canvas: stored ones would move with random views."""
    phase = PhaseConfig(
        study.settings(run, epochs),
        study.train_data,
        study.device,
        folder,
        folder / "model.safetensors",
        epochs,
        parts=("backbone", "roi_heads"),
        backbone_weights=study.weights,
        source={"command": f"benchmarks/paper.py, {run.name}"},
        report=report,
    )
    trainer = DenseTrainer(phase, _can_resume(folder))
    trainer.begin(folder)
    return trainer.run()


def _can_resume(folder: Path) -> bool:
    """Whether an earlier sitting has left a full epoch of a run, or of its first step of four."""
    states = (folder / "last" / STATE_FILE, folder / "step-1" / "last" / STATE_FILE)
    return any(path.is_file() for path in (*states, folder / "step-1" / FINISHED))
