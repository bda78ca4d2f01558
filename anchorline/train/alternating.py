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

import gc
import json
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from anchorline.data.proposals import write_proposals
from anchorline.data.summary import DataSummary
from anchorline.runtime.io.errors import ArtefactError
from anchorline.runtime.io.files import sha256_of, write_json
from anchorline.train.loop.distributed import from_main, is_main, run_shared, wait_for_all
from anchorline.train.loop.trainer import (
    STATE_FILE,
    PhaseConfig,
    Trainer,
    TrainResult,
    check_record,
    record_of,
    steps_of_epoch,
)
from anchorline.train.predict import load_rpn
from anchorline.train.settings import TrainingSettings

FINISHED = "finished.json"


def train_alternating(
    whole: PhaseConfig, resume: bool, show_data: Callable[[DataSummary], None] | None = None
) -> TrainResult:
    """The four steps of ``whole``, or with ``resume`` what is left; the result of the last that ran.

    Raises ``ArtefactError`` where there is nothing to resume, or of other settings or data.
    """
    out, steps, begun = whole.folder, four_steps(whole), False
    for step in steps:
        if resume and _is_finished(step):
            continue
        # Behind finished steps one without a state begins; with none at all there is nothing to resume.
        state = step.folder / "last" / STATE_FILE
        trainer = Trainer(step, resume and (step.name == "step 1" or from_main(state.is_file)))
        if not begun:
            if not resume and is_main():
                # What an earlier run in the folder would lead a later resume to believe.
                for each in steps:
                    (each.folder / FINISHED).unlink(missing_ok=True)
                    (each.folder / "last" / STATE_FILE).unlink(missing_ok=True)
            trainer.begin(out, show_data)
            begun = True
        result = trainer.run()
        del trainer  # and with it model, optimiser and workers, before the next one's
        gc.collect()  # DDP and the losses it calls refer to each other
        if result.interrupted or step is steps[-1]:
            break
        try:
            if step.task == "proposals":
                _store_proposals(step)
            if is_main():
                record = {**record_of(step), "model_sha256": sha256_of(step.checkpoint)}
                if step.task == "proposals":
                    record["proposals_sha256"] = sha256_of(_stored(step))
                write_json(step.folder / FINISHED, record)
                state.unlink(missing_ok=True)  # as large as the model three times
            wait_for_all()
        except KeyboardInterrupt:
            return replace(result, interrupted=True)
    return result


def four_steps(whole: PhaseConfig) -> tuple[PhaseConfig, ...]:
    """The phases of an alternating training in the folder of ``whole``."""
    epochs = epochs_of_steps(whole.settings.training)
    each = steps_of_epoch(len(whole.data), whole.settings)

    def step(number: int, **what: Any) -> PhaseConfig:
        folder, before = whole.folder / f"step-{number}", sum(epochs[: number - 1])
        return replace(
            whole,
            name=f"step {number}",
            folder=folder,
            checkpoint=folder / "model.safetensors",
            keep_best=False,
            epochs=epochs[number - 1],
            first_epoch=before,
            first_step=before * each,
            all_steps=sum(epochs) * each,
            **what,
        )

    first = step(1, parts=("backbone", "rpn"))
    second = step(2, parts=("backbone", "roi_heads"), proposals=_stored(first))
    third = step(3, parts=("rpn",), start=second.checkpoint, fresh=("rpn",))
    fourth = step(4, parts=("roi_heads",), start=third.checkpoint, proposals=_stored(third))
    return first, second, third, replace(fourth, checkpoint=whole.checkpoint, keep_best=True)


def epochs_of_steps(training: TrainingSettings) -> tuple[int, ...]:
    """``training.epochs`` shared by ``training.step_shares``: at least one each, the sum is kept."""
    spare = training.epochs - len(training.step_shares)
    wanted = [training.epochs * share / sum(training.step_shares) for share in training.step_shares]
    epochs = [1] * len(wanted)
    for _ in range(spare):
        behind = max(range(len(wanted)), key=lambda step: wanted[step] - epochs[step])
        epochs[behind] += 1
    return tuple(epochs)


def _stored(step: PhaseConfig) -> Path:
    """Where the proposals of an RPN step for the training images are stored."""
    return step.folder.with_name(step.folder.name.replace("step", "proposals") + ".jsonl")


def _store_proposals(step: PhaseConfig) -> None:
    training = step.settings.training
    rpn = load_rpn(step.checkpoint, str(step.device), training.rpn_pre_nms, training.rpn_post_nms)
    found = run_shared(rpn.batch, step.data, training.batch)
    if is_main():
        write_proposals(_stored(step), step.data, found)
    else:
        deque(found, maxlen=0)  # takes part, and keeps nothing
    wait_for_all()


def _is_finished(step: PhaseConfig) -> bool:
    """Whether an earlier run has finished ``step``; proposals that are not its own are written again.

    Raises ``ArtefactError`` for a step of other settings or data, or a changed checkpoint.
    """
    record = from_main(lambda: _read_finished(step))
    if record is not None and step.task == "proposals":
        stored = _stored(step)
        wanted = record.get("proposals_sha256")
        if not from_main(lambda: stored.is_file() and sha256_of(stored) == wanted):
            _store_proposals(step)
    return record is not None


def _read_finished(step: PhaseConfig) -> dict[str, Any] | None:
    path = step.folder / FINISHED
    if not path.is_file():
        return None
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        check_record(path, record, step)
        model = record["model_sha256"]
    except ArtefactError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtefactError(f"{path}: cannot be read ({error!r}); train without --resume") from None
    if not step.checkpoint.is_file() or sha256_of(step.checkpoint) != model:
        raise ArtefactError(
            f"{step.checkpoint}: is not the model that {step.name} has written; train without --resume"
        )
    return record
