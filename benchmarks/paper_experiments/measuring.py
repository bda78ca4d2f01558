"""What is measured on the models of each run: the rows of the table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anchorline.data.proposals import read_proposals
from anchorline.evaluation.evaluation import evaluate, proposal_recall, run_detector
from anchorline.runtime.detections import Detections
from anchorline.runtime.io.errors import TrainingError
from anchorline.train.alternating import epochs_of_steps
from anchorline.train.predict import StoredProposalDetector, TorchDetector
from paper_experiments.clock import Clock
from paper_experiments.proposals import ABLATIONS, AblatedRPN, DenseDetector, best_of
from paper_experiments.runs import COUNTS, SELECTIVE_SEARCH, TEST_PROPOSALS, WITHOUT_NMS, Run
from paper_experiments.state import Result
from paper_experiments.study import Study
from paper_experiments.timing import time_parts
from paper_experiments.training import Trained, search_proposals, train_run

CURVE_COUNTS = (50, 100, 200, 300, 500, 1000)
Row = dict[str, Any]
Found = Sequence[Detections]


@dataclass(frozen=True)
class Sitting:
    """What a run has at hand: the study, its epochs, the clock and the state folder."""

    study: Study
    epochs: int
    clock: Clock
    state: Path

    @property
    def device(self) -> str:
        return str(self.study.device)

    def trained(self, run: Run) -> Trained:
        return train_run(self.study, run, self.epochs, self.state / run.name, self.clock)

    def other(self, experiment: str, seed: int) -> Trained:
        """The models of an earlier run; raises ``TrainingError`` where its training failed."""
        trained = Trained(self.state / Run(experiment, seed).name, 0.0)
        if not trained.is_there:
            raise TrainingError(f"{trained.folder.name} has left no model to measure this on")
        return trained

    def steps(self, run: Run) -> tuple[int, ...]:
        """The epochs of the four steps of alternating training."""
        return epochs_of_steps(self.study.settings(run, self.epochs).training)


def execute(sitting: Sitting, run: Run) -> Result:
    """Train and measure one run; a training that cannot go on, by a loss of NaN, gives a row that says so."""
    try:
        return _MEASURE[run.experiment](sitting, run)
    except TrainingError as error:
        what = str(error).partition(";")[0]  # what follows names folders of this machine
        return Result([_row(run, epochs=sitting.epochs, note=f"failed: {what}")])


def _joint(sitting: Sitting, run: Run) -> Result:
    """Joint training with nine anchors and lambda 10, or with others for the sweeps."""
    trained = sitting.trained(run)
    row = _row(
        run,
        epochs=sitting.epochs,
        train_s=round(trained.seconds),
        proposals=TEST_PROPOSALS,
        **_accuracy(sitting, TorchDetector.load(trained.model, sitting.device)),
    )
    found = _proposed(sitting, trained.model)
    row |= _recall(sitting, found, TEST_PROPOSALS)
    if run.variant:
        return Result([row])
    return _with_curves(sitting, run, [row], {"RPN, joint training": found})


def _alternating(sitting: Sitting, run: Run) -> Result:
    """Shared features after step 4; after step 2 the two networks share nothing."""
    trained, epochs = sitting.trained(run), sitting.steps(run)
    common = {"proposals": TEST_PROPOSALS, "train_s": round(trained.seconds)}
    shared = _accuracy(sitting, TorchDetector.load(trained.model, sitting.device))
    rows = [_row(run, "shared", epochs=sum(epochs), **common, **shared)]
    apart = _proposed(sitting, trained.step(1))
    unshared = _on_stored(sitting, trained.step(2), apart, TEST_PROPOSALS)
    rows.append(_row(run, "unshared", epochs=sum(epochs[:2]), **common | {"train_s": ""}, **unshared))
    together = _proposed(sitting, trained.model)
    return _with_curves(sitting, run, rows, {"RPN, shared": together, "RPN, unshared": apart})


def _one_stage(sitting: Sitting, run: Run) -> Result:
    trained = sitting.trained(run)
    detector = DenseDetector.open(trained.model, sitting.device)
    figures = _accuracy(sitting, detector)
    row = _row(run, epochs=sitting.epochs, train_s=round(trained.seconds), proposals="all", **figures)
    return Result([row])


def _selective_search(sitting: Sitting, run: Run) -> Result:
    """Fast R-CNN trained and tested on selective search; a row without figures where it is missing."""
    study = sitting.study
    if study.no_search:
        return Result([_row(run, note=study.no_search)])
    trained = sitting.trained(run)
    path = search_proposals(study, sitting.state, sitting.clock)[1]
    found = [each.to_detections() for each in read_proposals(path, study.test_data)]
    figures = _on_stored(sitting, trained.model, found, SELECTIVE_SEARCH)
    row = _row(
        *(run,), epochs=sitting.epochs, train_s=round(trained.seconds), proposals=SELECTIVE_SEARCH, **figures
    )
    return _with_curves(sitting, run, [row], {"selective search": found})


def _proposals(sitting: Sitting, run: Run) -> Result:
    """Table 2's ablation: an RPN with parts switched off, before a detector that stays the same.

    The RPN is the joint run's, which has had all epochs; step 1's of alternating training has few, and scores
    that are half learnt do not say what scores are worth. The detector was trained on selective search where
    there is one, as the paper's, else it is that of step 2. So the two never share features.
    """
    joint, by_search = sitting.other("joint", run.seed), not sitting.study.no_search
    if by_search:
        detector = sitting.other("selective-search", run.seed).model
    else:
        detector = sitting.other("alternating", run.seed).step(2)
    trained_on = "selective search" if by_search else "the proposals of step 1"
    note = f"joint training's RPN, detector trained on {trained_on}"
    rows = []
    for ablation in ABLATIONS:
        counts = COUNTS if ablation.nms or not ablation.cls else (*COUNTS, WITHOUT_NMS)
        sitting.clock.check()
        rpn = AblatedRPN.open(joint.model, ablation, max(counts), run.seed, sitting.device)
        found = list(run_detector(rpn.batch, sitting.study.test_data))
        for count in counts:
            figures = _on_stored(sitting, detector, found, count) | _recall(sitting, found, count)
            rows.append(_row(run, ablation.name, proposals=count, note=note, **figures))
    return Result(rows)


def _timing(sitting: Sitting, run: Run) -> Result:
    sitting.clock.check()
    joint = sitting.other("joint", run.seed)
    model = TorchDetector.load(joint.model, sitting.device)
    times = time_parts(model, [image.load() for image in sitting.study.test_data.images[:10]])
    row = _row(run, proposals=TEST_PROPOSALS)
    return Result([row | {f"{name}_ms": ms for name, ms in times.items()}])


_MEASURE: dict[str, Callable[[Sitting, Run], Result]] = {
    "joint": _joint,
    "anchors": _joint,
    "lambda": _joint,
    "alternating": _alternating,
    "one-stage": _one_stage,
    "selective-search": _selective_search,
    "proposals": _proposals,
    "timing": _timing,
}


def _row(run: Run, variant: str = "", **figures: Any) -> Row:
    return {
        "experiment": run.experiment,
        "variant": variant or run.variant,
        "seed": run.seed,
        "proposals": "",
        **figures,
    }


def _accuracy(sitting: Sitting, detector: TorchDetector) -> Row:
    """VOC's two mAPs and COCO's on the test images."""
    sitting.clock.check()
    report = evaluate(detector.batch, sitting.study.test_data, provider=detector.provider)
    names = ("voc07", "map50", "map")
    return {name: round(getattr(report, name), 4) for name in names}


def _on_stored(sitting: Sitting, model: Path, found: Found, count: int) -> Row:
    """The same of a Fast R-CNN on the ``count`` best of each image's proposals, and their mean number."""
    stored = best_of(sitting.study.test_data, found, count)
    detector = StoredProposalDetector.open(model, stored, sitting.device)
    each = sum(len(image.boxes) for image in stored) / max(1, len(stored))
    return {**_accuracy(sitting, detector), "found": round(each, 1)}


def _proposed(sitting: Sitting, model: Path) -> list[Detections]:
    """The RPN's proposals for the test images, enough for the recall of 1000."""
    sitting.clock.check()
    rpn = AblatedRPN.open(model, ABLATIONS[0], max(CURVE_COUNTS), 0, sitting.device)
    return list(run_detector(rpn.batch, sitting.study.test_data))


def _recall(sitting: Sitting, found: Found, count: int) -> Row:
    report = proposal_recall(sitting.study.test_data.images, found, (count,))
    by_iou = report.recall[count]
    return {
        "recall50": round(by_iou[0.5], 4),
        "recall70": round(by_iou[0.7], 4),
        "ar": round(report.ar, 4),
    }


def _with_curves(sitting: Sitting, run: Run, rows: list[Row], found: dict[str, list[Detections]]) -> Result:
    """``rows``, recall against IoU of each source of proposals, and its rows by number of proposals."""
    curves, recall_run = {}, dataclasses.replace(run, experiment="recall", variant="")
    for name, each in found.items():
        report = proposal_recall(sitting.study.test_data.images, each, CURVE_COUNTS)
        curves[name] = report.to_json()["recall"]
        rows += [_row(recall_run, name, proposals=n, **_recall(sitting, each, n)) for n in CURVE_COUNTS]
    return Result(rows, curves)
