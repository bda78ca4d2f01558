"""What a training was asked for, whatever its schedule, and what every schedule does with it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from anchorline.data.dataset import Dataset
from anchorline.data.proposals import read_proposals
from anchorline.data.summary import DataSummary, summarise_data
from anchorline.evaluation.evaluate import evaluate
from anchorline.evaluation.recall import proposal_recall
from anchorline.runtime.contract import Contract
from anchorline.runtime.io.files import atomic_write_text, write_json
from anchorline.train.checkpoint import contract_of
from anchorline.train.data.sample_sheet import write_sample_sheet
from anchorline.train.loop.distributed import first_on_each_machine, is_main, process_count
from anchorline.train.loop.launch import place
from anchorline.train.loop.shared_detection import own_share, run_shared, shared_map50
from anchorline.train.loop.trainer import Phase, Plan, Report, Validate
from anchorline.train.model.faster_rcnn import OUTPUTS, STORED_PROPOSALS, FasterRCNN
from anchorline.train.predict import TorchDetector
from anchorline.train.pretrained import load_pretrained
from anchorline.train.proposing import StoredProposalDetector
from anchorline.train.settings import Settings

Weights = Callable[[FasterRCNN], None]

VALIDATION_BATCH = 4  # images


@dataclass(frozen=True)
class Job:
    """The arguments of ``training.train``."""

    settings: Settings
    data: Dataset
    out: Path
    validation: Dataset | None
    device: torch.device
    source: dict[str, Any]
    backbone_weights: Path | str | None = None
    report: Report | None = None
    show_data: Callable[[DataSummary], None] | None = None
    proposals: Path | None = None
    validation_proposals: Path | None = None

    def phase(self, plan: Plan, task: str, weights: Weights | None, proposals: Path | None = None) -> Phase:
        """A phase that begins with ``weights``; every one draws its fresh layers from the same seed.

        With ``proposals`` its detection head trains on these stored ones.
        """
        stored = None if proposals is None else read_proposals(proposals, self.data)
        validate = self._validation(plan, task)
        torch.manual_seed(self.settings.training.seed)
        contract = self.contract(task, plan.needs_proposals)
        return Phase(self.settings, self.data, contract, self.device, plan, validate, stored, weights)

    def contract(self, task: str, needs_proposals: bool) -> Contract:
        """The contract of a model of this training."""
        source = {**self.source, "data": self.data.spec, "settings": self.settings.to_dict()}
        if needs_proposals:
            source[STORED_PROPOSALS] = True
        contract = contract_of(self.settings.model, self.data.names, self.data.category_ids, source)
        return dataclasses.replace(contract, task=task, outputs=OUTPUTS[task])

    def _validation(self, plan: Plan, task: str) -> Validate | None:
        """What measures a model of the phase on the validation data; None where that is not possible."""
        data = self.validation
        if data is None or (plan.needs_proposals and self.validation_proposals is None):
            return None
        given = self.validation_proposals if plan.needs_proposals else None
        stored = None if given is None else read_proposals(given, data)

        def validate(model: FasterRCNN, contract: Contract) -> float:
            detector: TorchDetector
            if stored is not None:
                share = own_share(stored, VALIDATION_BATCH)
                detector = StoredProposalDetector(model, contract, share, str(self.device))
            else:
                detector = TorchDetector(model, contract, str(self.device))
            if task == "proposals":
                found = list(run_shared(detector.batch, data, VALIDATION_BATCH))
                count = contract.thresholds.max_proposals
                return proposal_recall(data.images, found, (count,)).recall[count][0.5]
            if process_count() > 1:
                return shared_map50(detector.batch, data, VALIDATION_BATCH, detector.provider)
            return evaluate(detector.batch, data, VALIDATION_BATCH, provider=detector.provider).map50

        return validate

    def pretrained(self) -> Weights | None:
        """What fills a fresh model with the ImageNet weights; None where none are given."""
        given = self.backbone_weights
        if given is None:
            return None

        def load(model: FasterRCNN) -> None:
            with first_on_each_machine(place().local_rank):
                load_pretrained(model, given, self.settings.training.pretrained_input)

        return load

    def begin(self, phase: Phase) -> None:
        """Effective settings, what the data holds, and a picture of the first views with their boxes.

        The main process does this; the others wait for it at the first step.
        """
        if not is_main():
            return
        summary = summarise_data(self.data)
        text = json.dumps(dataclasses.asdict(self.settings), indent=2, sort_keys=True)
        atomic_write_text(self.out / "settings.json", text + "\n")
        write_json(self.out / "data.json", summary.to_json())
        write_sample_sheet(phase.views, self.out / "samples.png")
        if self.show_data is not None:
            self.show_data(summary)
