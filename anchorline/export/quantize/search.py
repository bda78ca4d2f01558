"""The search for the fewest layers that have to stay float32 for the result to hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from anchorline import __version__
from anchorline.data.dataset import Dataset
from anchorline.evaluation.evaluate import Progress
from anchorline.export.quantize.checks import Loss, LossMeter
from anchorline.export.quantize.graph import WEIGHT_BITS, Layer, Range, quantized
from anchorline.export.quantize.sensitivity import Sensitivity
from anchorline.runtime.contract import CONTRACT_KEY, Contract
from anchorline.runtime.detector import Detector
from anchorline.runtime.io.errors import ParityError
from anchorline.verify.material import first_images
from anchorline.verify.report import VerifyReport
from anchorline.verify.stages import onnx_subject
from anchorline.verify.verify import verify as verify_subjects

# With more than this share of the layers in float, the file is not worth having.
MOST_FLOAT = 0.5

# ``anchorline verify`` tries everything; here it is done for several models in a row.
VERIFY_IMAGES = 8
VERIFY_TRAPS = ("empty image", "all 255", "mixed sizes in a batch")


@dataclass
class Steps:
    """Progress whose total grows as it turns out what has to be done."""

    progress: Progress | None
    done: int = 0
    total: int = 0

    def expect(self, number: int) -> None:
        self.total += number

    def step(self, *_: int) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)


@dataclass(frozen=True)
class Job:
    """Everything that a quantisation needs; ``usable`` are the layers that may be integers."""

    model: Path
    out: Path
    target: str
    method: str
    max_drop: float
    proto: onnx.ModelProto
    detector: Detector
    dataset: Dataset
    layers: Sequence[Layer]
    usable: Sequence[Layer]
    steps: Steps

    @property
    def contract(self) -> Contract:
        return self.detector.contract


@dataclass(frozen=True)
class Trial:
    """A model with some layers in float: what it loses, and how it compares with the float model.

    ``report`` is None where that was not asked for, or the loss was too much already.
    """

    floats: tuple[str, ...]
    loss: Loss
    report: VerifyReport | None
    holds: bool

    def describe(self) -> str:
        """What was seen, in one line."""
        differs = (
            "" if self.report is None or self.report.passed else f", and differs in {self.report.reason}"
        )
        return f"{self.loss.describe()}{differs}"


class Versions:
    """The models with more and more layers in float, the most costly first."""

    def __init__(
        self, job: Job, ranges: dict[str, Range], costs: Sequence[Sensitivity], full: onnx.ModelProto
    ) -> None:
        self._job, self._ranges = job, ranges
        self.order = [cost.name for cost in costs]
        self._last = (0, full)  # writing one takes seconds, and the last one tried is often the chosen one

    def save(self, number: int, loss: Loss | None, path: Path) -> None:
        """Write the model with ``number`` float layers to ``path``, its contract saying so."""
        floats = self.order[:number]
        if self._last[0] != number:
            kept = [layer for layer in self._job.usable if layer.name not in floats]
            made = quantized(self._job.proto, kept, self._ranges, self._job.target)
            self._last = (number, made)
        model = self._last[1]
        for entry in model.metadata_props:
            if entry.key == CONTRACT_KEY:
                entry.value = contract_of(self._job, floats, loss).to_json()
        onnx.checker.check_model(model)
        onnx.save(model, path)


def settle(job: Job, meter: LossMeter, versions: Versions, path: Path, verify: bool) -> tuple[Trial, int]:
    """Write to ``path`` the model with the fewest float layers that holds; it, and how many were tried.

    It holds where the loss is within ``job.max_drop`` and, with ``verify``, it agrees with the float model
    within the tolerances of int8. Raises ``ParityError`` where none does.
    """
    tried: list[Trial] = []

    def attempt(number: int) -> Trial:
        if tried:
            job.steps.expect(len(job.dataset))
        versions.save(number, None, path)
        with Detector(path, "cpu") as detector:
            loss = meter.measure(detector.batch, job.steps.step)
        holds = loss.drop <= job.max_drop
        report = _compare(job, path) if verify and holds else None
        holds = holds and (report is None or report.passed)
        tried.append(Trial(tuple(versions.order[:number]), loss, report, holds))
        return tried[-1]

    most = int(MOST_FLOAT * len(versions.order))
    chosen = fewest_float(most, attempt)
    if not chosen.holds:
        raise ParityError(
            f"{job.out}: {chosen.describe()}, with the {len(chosen.floats)} most costly of "
            f"{len(versions.order)} layers in float; a drop of {job.max_drop:g} is allowed. The file was not "
            "published; allow more with --max-drop, or calibrate on more images"
        )
    versions.save(len(chosen.floats), chosen.loss, path)
    return chosen, len(tried)


def fewest_float(most: int, attempt: Callable[[int], Trial]) -> Trial:
    """The trial with the fewest float layers that holds, or the last one where none of up to ``most`` does.

    ``attempt(number)`` tries that many. Doubling, then halving the gap: some ten trials for a hundred
    layers. Where more float layers do harm, as they seldom do, it may not be the fewest.
    """
    number, fails = 0, -1
    trial = attempt(number)
    while not trial.holds:
        if number >= most:
            return trial
        fails, number = number, min(max(1, 2 * number), most)
        trial = attempt(number)
    while number - fails > 1:
        middle = (fails + number) // 2
        between = attempt(middle)
        if between.holds:
            number, trial = middle, between
        else:
            fails = middle
    return trial


def contract_of(job: Job, floats: Sequence[str], loss: Loss | None) -> Contract:
    """The model's contract with the precision int8, and in its source how that came about."""
    record = {
        "for": job.target,
        "weight_bits": WEIGHT_BITS[job.target],
        "data": job.dataset.spec,
        "images": len(job.dataset),
        "method": job.method,
        "float_layers": list(floats),
        "last_layers": [layer.name for layer in job.layers if layer.last],
        "max_drop": job.max_drop,
        "loss": None if loss is None else loss.to_json(),
        "by": f"anchorline {__version__}",
    }
    return dataclasses.replace(
        job.contract, precision="int8", source={**job.contract.source, "quantised": record}
    )


def _compare(job: Job, path: Path) -> VerifyReport:
    """The model at ``path`` against the float one, stage by stage, on some of the calibration images."""
    reference, candidate = onnx_subject(job.model), onnx_subject(path)
    try:
        return verify_subjects(
            reference, candidate, first_images(job.dataset, VERIFY_IMAGES), which_traps=VERIFY_TRAPS
        )
    finally:
        reference.close()
        candidate.close()
