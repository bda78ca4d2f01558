"""4-step alternating training (Faster R-CNN, section 3.2) by one command.

1. RPN, backbone included, from the ImageNet weights; its proposals for the training images are stored.
2. Fast R-CNN from the ImageNet weights again, a fresh backbone, on the proposals of step 1.
3. RPN again on the detector's backbone: shared convolutions (backbone, pyramid and the statistics of
   live batch norms) fixed, the RPN's own layers fresh, as in the reference implementation, whose first
   detector carries untrained RPN layers for it (py-faster-rcnn, the "dummy" layers of
   ``stage1_fast_rcnn_train.pt``); proposals stored again.
4. The head of step 2 goes on, on the proposals of step 3, shared convolutions fixed: one unified model.

Every step has a folder ``RUN/step-N/`` as a joint training has, and its own learning-rate schedule with
warm-up. A step hands on its latest weights (the moving average where there is one); the best by
validation is kept in the last step alone. Steps 1 and 3 validate the recall of their proposals, step 2
nothing: it has no RPN of its own.
"""

from __future__ import annotations

import dataclasses
import json
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anchorline.data.proposals import write_proposals
from anchorline.runtime.io.errors import ArtefactError
from anchorline.runtime.io.files import sha256_of, write_json
from anchorline.train.checkpoint import load_checkpoint
from anchorline.train.loop.distributed import from_main, is_main, wait_for_all
from anchorline.train.loop.job import Job, Weights
from anchorline.train.loop.settings import TrainingSettings
from anchorline.train.loop.shared_detection import run_shared
from anchorline.train.loop.trainer import (
    STATE_FILE,
    PhaseResult,
    Plan,
    check_trained_with,
    detection_losses,
    rpn_losses,
    steps_of_epoch,
)
from anchorline.train.model.faster_rcnn import FasterRCNN
from anchorline.train.proposing import load_rpn

FINISHED = "finished.json"


@dataclass(frozen=True)
class _Step:
    """One of the four: what it trains, and the step whose stored proposals it takes (0: none)."""

    number: int
    parts: tuple[str, ...]
    proposals_of: int = 0

    @property
    def trains_rpn(self) -> bool:
        return "rpn" in self.parts

    @property
    def task(self) -> str:
        return "proposals" if self.trains_rpn else "detections"


_STEPS = (
    _Step(1, ("backbone", "rpn")),
    _Step(2, ("backbone", "roi_heads"), proposals_of=1),
    _Step(3, ("rpn",)),
    _Step(4, ("roi_heads",), proposals_of=3),
)


def epochs_of_steps(training: TrainingSettings) -> tuple[int, ...]:
    """``training.epochs`` shared by ``training.step_shares``: at least one each, the sum is kept."""
    spare = training.epochs - len(training.step_shares)
    wanted = [training.epochs * share / sum(training.step_shares) for share in training.step_shares]
    epochs = [1] * len(wanted)
    for _ in range(spare):
        behind = max(range(len(wanted)), key=lambda step: wanted[step] - epochs[step])
        epochs[behind] += 1
    return tuple(epochs)


def train_alternating(job: Job, resume: bool) -> PhaseResult:
    """The four steps, or with ``resume`` what is left of them; the result of the last one that ran.

    Raises ``ArtefactError`` where there is nothing to resume, or of other settings or data.
    """
    run = _Alternating(job)
    begun = False
    for step in _STEPS:
        if resume and run.is_finished(step):
            continue
        result = run.train(step, resume, begun)
        begun = True
        if result.interrupted:
            return result
        try:
            run.conclude(step)
        except KeyboardInterrupt:
            return dataclasses.replace(result, interrupted=True)
    return result


class _Alternating:
    """The run folder of an alternating training, and what passes from step to step in it."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.plans = self._plans()

    def _plans(self) -> tuple[Plan, ...]:
        job, plans = self.job, []
        epochs, each = epochs_of_steps(job.settings.training), steps_of_epoch(len(job.data), job.settings)
        for step in _STEPS:
            folder, last = self._folder(step.number), step is _STEPS[-1]
            before = sum(epochs[: step.number - 1])
            plans.append(
                Plan(
                    folder=folder,
                    checkpoint=(job.out if last else folder) / "model.safetensors",
                    epochs=epochs[step.number - 1],
                    losses=rpn_losses if step.trains_rpn else detection_losses,
                    parts=step.parts,
                    needs_proposals=step.number == 2,
                    metric="recall50" if step.trains_rpn else "map50",
                    keep_best=last,
                    name=f"step {step.number}",
                    first_epoch=before,
                    first_step=before * each,
                    all_steps=sum(epochs) * each,
                )
            )
        return tuple(plans)

    def train(self, step: _Step, resume: bool, begun: bool) -> PhaseResult:
        """One step, from its beginning or from its last full epoch."""
        plan, job = self.plans[step.number - 1], self.job
        # Behind finished steps one without a state begins; with none at all there is nothing to resume.
        state = plan.folder / "last" / STATE_FILE
        resumes = resume and (step.number == 1 or from_main(state.is_file))
        given = self._proposals(step.proposals_of) if step.proposals_of else None
        phase = job.phase(plan, step.task, None if resumes else self._weights(step), given)
        if resumes:
            phase.resume()
        if not begun:
            if not resume and is_main():
                self._forget_earlier()
            job.begin(phase)
        result = phase.train(job.report)
        return dataclasses.replace(result, steps=plan.first_step + result.steps)

    def conclude(self, step: _Step) -> None:
        """Store the proposals of an RPN step, and note that the step is finished."""
        if step is _STEPS[-1]:
            return  # its state says so, and keeps the best figure
        if step.trains_rpn:
            self._write_proposals(step)
        if is_main():
            self._note_finished(step)
        wait_for_all()

    def _note_finished(self, step: _Step) -> None:
        plan = self.plans[step.number - 1]
        record = {**self._trained_with(), "model_sha256": sha256_of(plan.checkpoint)}
        if step.trains_rpn:
            record["proposals_sha256"] = sha256_of(self._proposals(step.number))
        write_json(plan.folder / FINISHED, record)
        (plan.folder / "last" / STATE_FILE).unlink(missing_ok=True)  # as large as the model three times

    def is_finished(self, step: _Step) -> bool:
        """Whether an earlier run has finished ``step``; proposals that are not its own are written again.

        Raises ``ArtefactError`` for a step of other settings or data, or a changed checkpoint.
        """
        record = from_main(lambda: self._finished(step))
        if record is None:
            return False
        if step.trains_rpn and from_main(lambda: self._stored_sha256(step)) != record.get("proposals_sha256"):
            self._write_proposals(step)
        return True

    def _finished(self, step: _Step) -> dict[str, Any] | None:
        """What was noted of ``step`` when it was finished; None where it was not."""
        plan = self.plans[step.number - 1]
        path = plan.folder / FINISHED
        if step is _STEPS[-1] or not path.is_file():
            return None
        try:
            record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            trained_with, data, model = record["settings"], record["data"], record["model_sha256"]
            check_trained_with(path, trained_with, self.job.settings)
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, ArtefactError):
                raise
            raise ArtefactError(f"{path}: cannot be read ({error!r}); train without --resume") from None
        if data != self._trained_with()["data"]:
            raise ArtefactError(
                f"{path}: was trained on other data ({data}); resume with the same data, "
                "or train without --resume"
            )
        if not plan.checkpoint.is_file() or sha256_of(plan.checkpoint) != model:
            raise ArtefactError(
                f"{plan.checkpoint}: is not the model that {plan.name} has written; train without --resume"
            )
        return record

    def _stored_sha256(self, step: _Step) -> str | None:
        path = self._proposals(step.number)
        return sha256_of(path) if path.is_file() else None

    def _weights(self, step: _Step) -> Weights | None:
        """What ``step`` begins with; layers it does not fill are fresh."""
        if step.number <= 2:
            return self.job.pretrained()
        path = self.plans[step.number - 2].checkpoint
        parts = ("backbone", "roi_heads") if step.number == 3 else ("backbone", "rpn", "roi_heads")

        def load(model: FasterRCNN) -> None:
            before = load_checkpoint(path)[0]
            for part in parts:
                model.get_submodule(part).load_state_dict(before.get_submodule(part).state_dict())

        return load

    def _write_proposals(self, step: _Step) -> None:
        job, training = self.job, self.job.settings.training
        rpn = load_rpn(
            self.plans[step.number - 1].checkpoint,
            str(job.device),
            training.rpn_pre_nms,
            training.rpn_post_nms,
        )
        found = run_shared(rpn.batch, job.data, training.batch)
        if is_main():
            write_proposals(self._proposals(step.number), job.data, found)
        else:
            deque(found, maxlen=0)  # takes part, and keeps nothing
        wait_for_all()

    def _trained_with(self) -> dict[str, object]:
        names, images = self.job.data.names, len(self.job.data)
        settings = json.loads(json.dumps(self.job.settings.to_dict()))
        return {"settings": settings, "data": {"classes": list(names), "images": images}}

    def _forget_earlier(self) -> None:
        """Remove what an earlier run in the folder would lead a later ``resume`` to believe."""
        for step in _STEPS:
            for path in (FINISHED, Path("last") / STATE_FILE):
                (self._folder(step.number) / path).unlink(missing_ok=True)

    def _folder(self, number: int) -> Path:
        return self.job.out / f"step-{number}"

    def _proposals(self, number: int) -> Path:
        return self.job.out / f"proposals-{number}.jsonl"
