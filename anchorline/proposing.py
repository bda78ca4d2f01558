"""Stored proposals for the command: ``anchorline proposals``, and ``anchorline evaluate`` with such files."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anchorline.data.proposals import read_proposals, write_proposals
from anchorline.data.specs import load_datasets
from anchorline.evaluation.evaluate import Progress, run_detector
from anchorline.evaluation.recall import ProposalReport, proposal_recall
from anchorline.runtime.io.errors import SettingsError

if TYPE_CHECKING:
    from anchorline.data.dataset import Dataset
    from anchorline.runtime.detections import Detections

SELECTIVE_SEARCH = "selective-search"


def store_proposals(
    data: Sequence[str],
    out: Path,
    *,
    model: Path | None = None,
    method: str | None = None,
    count: int | None = None,
    provider: str = "auto",
    progress: Progress | None = None,
) -> int:
    """Write the proposals of every image of ``data`` to ``out``; returns the number of boxes.

    They are those of ``model`` (a checkpoint, or an ONNX file of the task ``proposals``) or of the
    ``method`` ``"selective-search"``, at most ``count`` an image (default: the model's own number, or
    2000). Raises ``SettingsError``, and what reading data and model raise.
    """
    proposer = _open_proposer(model, method, count, provider)
    dataset, boxes = load_datasets(data), 0

    def found() -> Iterator[Detections]:
        nonlocal boxes
        for each in run_detector(proposer.batch, dataset, 1, progress):
            kept = each if count is None else each[(-each.scores).argsort(kind="stable")[:count]]
            boxes += len(kept)
            yield kept

    write_proposals(out, dataset, found())
    return boxes


def _open_proposer(model: Path | None, method: str | None, count: int | None, provider: str) -> Any:
    if (model is None) == (method is None):
        raise SettingsError(f"model is {model}, method {method}; expected one: --model MODEL or --method")
    if model is None:
        from anchorline.data.proposals import SelectiveSearch

        if method != SELECTIVE_SEARCH:
            raise SettingsError(f"method is {method!r}; expected {SELECTIVE_SEARCH!r}")
        return SelectiveSearch() if count is None else SelectiveSearch(count)
    if model.suffix == ".safetensors":
        from anchorline.train.proposing import load_rpn

        return load_rpn(model, post_nms=count)
    from anchorline.runtime import Detector

    detector = Detector(model, provider=provider)
    if detector.contract.task != "proposals":
        raise SettingsError(
            f"{model}: has the task {detector.contract.task!r}; expected a model exported with "
            "--task proposals, or a .safetensors"
        )
    return detector


def recall_of_file(path: Path, dataset: Dataset) -> ProposalReport:
    """The recall of the stored proposals in ``path`` on ``dataset``; raises ``DataError``."""
    stored = [each.to_detections() for each in read_proposals(path, dataset)]
    return dataclasses.replace(proposal_recall(dataset.images, stored), provider="stored proposals")


def open_on_proposals(model: Path, proposals: Path, data: Sequence[str]) -> Any:
    """The detection head of the checkpoint ``model`` on the stored proposals for ``data``, as a detector."""
    from anchorline.train.checkpoint import read_header
    from anchorline.train.proposing import StoredProposalDetector

    if model.suffix != ".safetensors":
        raise SettingsError(f"{model}: cannot take stored proposals; expected a model.safetensors")
    dataset = load_datasets(data, names=read_header(model)[1].names)
    return StoredProposalDetector.open(model, read_proposals(proposals, dataset))
