"""From labelled images to training batches on the canvas."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision import tv_tensors

from anchorline.data.dataset import Dataset
from anchorline.data.proposals import ImageProposals
from anchorline.runtime.canvas import boxes_to_canvas, place, to_canvas
from anchorline.runtime.contract import ResizeRule
from anchorline.runtime.io.errors import AnchorlineError
from anchorline.train.data.sampler import EpochSampler, seed_of
from anchorline.train.data.transforms import build_transforms
from anchorline.train.loop.distributed import process_count, rank
from anchorline.train.loop.settings import TrainingSettings
from anchorline.train.model.assign import IGNORE_LABEL, PROPOSAL_LABEL, Targets
from anchorline.train.model.ops import SUPPRESSED
from anchorline.train.model.rpn import Proposals


@dataclass(frozen=True)
class Batch:
    """``images`` uint8 [B, H, W, 3] BGR canvases, ``image_sizes`` float32 [B, 2], targets, and ids.

    An id names every image of a mosaic, the first one first: ``a + b + c + d``. ``proposals`` are the
    stored ones, moved with the pixels, where the training is given any.
    """

    images: Tensor
    image_sizes: Tensor
    targets: Targets
    ids: tuple[str, ...]
    proposals: Proposals | None = None

    def to(self, device: torch.device) -> Batch:
        """The same on ``device``."""
        proposals = self.proposals
        if proposals is not None:
            proposals = Proposals(proposals.boxes.to(device), proposals.scores.to(device))
        sizes, targets = self.image_sizes.to(device), self.targets.to(device)
        return Batch(self.images.to(device), sizes, targets, self.ids, proposals)


@dataclass(frozen=True)
class _Boxes:
    """What is on a view: ``boxes`` [N, 4] and their ``labels`` [N]; ``scores`` [N] count for proposals."""

    boxes: NDArray[np.float32]
    labels: Tensor
    scores: Tensor


class CanvasDataset(TorchDataset[dict[str, Any]]):
    """Random views of labelled images, laid onto the canvas.

    A view depends on (seed, epoch, index) alone, so neither workers nor a resumed run change it.
    Keys are (epoch, index). Crowds and difficult objects are no objects to learn but regions to ignore:
    ``boxes`` [N, 4] and ``labels`` [N] of an item hold the former, ``ignored`` [I, 4] the latter. With
    ``proposals``, one entry an image, items also hold the best ``rpn_post_nms`` of those that the view
    shows, in falling order: ``proposal_boxes`` and ``proposal_scores``, with -1 in unused slots.
    """

    def __init__(
        self,
        data: Dataset,
        canvas: tuple[int, int],
        resize: ResizeRule,
        settings: TrainingSettings,
        proposals: Sequence[ImageProposals] | None = None,
    ) -> None:
        self.data, self.canvas, self.resize, self.seed = data, canvas, resize, settings.seed
        self.proposals, self.slots = proposals, settings.rpn_post_nms
        self.transforms = build_transforms(settings)
        self.mosaic = settings.mosaic

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        seed = seed_of(self.seed, epoch, index)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            mosaic = self.mosaic > 0 and float(torch.rand(())) < self.mosaic
            return {"seed": seed, **(self._mosaic(index) if mosaic else self._single(index))}

    def _single(self, index: int) -> dict[str, Any]:
        """One image on the canvas."""
        out = np.empty((*self.canvas, 3), np.uint8)
        valid, found = self._lay(index, self.resize, out)
        return self._item([index], out, valid, [found])

    def _mosaic(self, index: int) -> dict[str, Any]:
        """Four images in the quarters of the canvas, the asked one first, the others drawn at random."""
        indices = [index, *torch.randint(len(self.data), (3,)).tolist()]
        out = np.zeros((*self.canvas, 3), np.uint8)
        height, width = self.canvas[0] // 2, self.canvas[1] // 2
        parts = []
        for quarter, each in enumerate(indices):
            top, left = quarter // 2 * height, quarter % 2 * width
            _, found = self._lay(each, ResizeRule(), out[top : top + height, left : left + width])
            moved = found.boxes + np.array([left, top, left, top], np.float32)
            parts.append(dataclasses.replace(found, boxes=moved))
        return self._item(indices, out, self.canvas, parts)

    def _lay(self, index: int, resize: ResizeRule, out: NDArray[np.uint8]) -> tuple[tuple[int, int], _Boxes]:
        """Lay a random view of an image onto ``out``; its valid size, and what is there."""
        image, found = self._view(index)
        placement = place((image.shape[0], image.shape[1]), (out.shape[0], out.shape[1]), resize)
        to_canvas(image, placement, out)
        return placement.valid, dataclasses.replace(found, boxes=boxes_to_canvas(found.boxes, placement))

    def _item(
        self, indices: list[int], image: NDArray[np.uint8], valid: tuple[int, int], parts: list[_Boxes]
    ) -> dict[str, Any]:
        boxes = torch.from_numpy(np.concatenate([part.boxes for part in parts]))
        labels = torch.cat([part.labels for part in parts])
        item = {
            "image": torch.from_numpy(image),
            "size": torch.tensor(valid, dtype=torch.float32),
            "boxes": boxes[labels >= 0],
            "labels": labels[labels >= 0],
            "ignored": boxes[labels == IGNORE_LABEL],
            "id": " + ".join(dict.fromkeys(self.data.images[index].id for index in indices)),
        }
        if self.proposals is not None:
            proposed = labels <= PROPOSAL_LABEL
            scores = torch.cat([part.scores for part in parts])[proposed]
            item["proposal_boxes"], item["proposal_scores"] = _best(boxes[proposed], scores, self.slots)
        return item

    def _view(self, index: int) -> tuple[np.ndarray, _Boxes]:
        item = self.data.images[index]
        pixels = item.load()
        boxes, labels = item.boxes, np.where(item.difficult | item.crowd, IGNORE_LABEL, item.labels)
        if self.proposals is not None:
            given = self.proposals[index].boxes
            boxes = np.concatenate([boxes, given])
            labels = np.concatenate([labels, PROPOSAL_LABEL - np.arange(len(given))])
        target = {
            "boxes": tv_tensors.BoundingBoxes(
                torch.tensor(boxes), format="XYXY", canvas_size=pixels.shape[:2]
            ),
            "labels": torch.from_numpy(labels),
        }
        image = tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1).flip(0))
        image, target = self.transforms(image, target)
        bgr = image.as_subclass(Tensor).flip(0).permute(1, 2, 0).contiguous().numpy()
        found = target["boxes"].as_subclass(Tensor).numpy()
        return bgr, _Boxes(found, target["labels"], self._scores(index, target["labels"]))

    def _scores(self, index: int, labels: Tensor) -> Tensor:
        """The scores of the proposals among ``labels``; zero for everything else."""
        scores = torch.zeros(len(labels))
        proposed = labels <= PROPOSAL_LABEL
        if self.proposals is not None and proposed.any():
            scores[proposed] = torch.from_numpy(self.proposals[index].scores)[
                PROPOSAL_LABEL - labels[proposed]
            ]
        return scores


def _best(boxes: Tensor, scores: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """The ``slots`` best of P proposals: boxes [slots, 4], zero where unused, and scores, -1 there."""
    order = scores.argsort(descending=True, stable=True)[:slots]
    kept_boxes, kept_scores = torch.zeros(slots, 4), torch.full((slots,), SUPPRESSED)
    kept_boxes[: len(order)], kept_scores[: len(order)] = boxes[order], scores[order]
    return kept_boxes, kept_scores


def collate(items: list[dict[str, Any]]) -> Batch:
    """Join canvases into one batch."""
    return Batch(
        images=torch.stack([item["image"] for item in items]),
        image_sizes=torch.stack([item["size"] for item in items]),
        targets=Targets.pad(
            [item["boxes"] for item in items],
            [item["labels"] for item in items],
            tuple(item["seed"] for item in items),
            [item["ignored"] for item in items],
        ),
        ids=tuple(item["id"] for item in items),
        proposals=_join_proposals(items),
    )


def _join_proposals(items: list[dict[str, Any]]) -> Proposals | None:
    if "proposal_boxes" not in items[0]:
        return None
    boxes, scores = (
        torch.stack([item[f"proposal_{name}"] for item in items]) for name in ("boxes", "scores")
    )
    return Proposals(boxes, scores)


def build_loader(
    dataset: CanvasDataset, settings: TrainingSettings
) -> tuple[DataLoader[dict[str, Any]], EpochSampler]:
    """A loader of this process's part of the batches, and its sampler: set its ``epoch`` before a pass."""
    sampler = EpochSampler(len(dataset), settings.batch, settings.seed, rank(), process_count())
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=settings.workers,
        collate_fn=collate,
        generator=torch.Generator(),  # its own: starting workers takes no number from the training's
        worker_init_fn=_start_worker,
        persistent_workers=settings.workers > 0,
    )
    return loader, sampler


def read_batches(loader: DataLoader[dict[str, Any]]) -> Iterator[Batch]:
    """The batches of one epoch; an image that cannot be read stays an error of one line."""
    try:
        yield from loader
    except AnchorlineError as error:
        # A worker's exception arrives with its whole traceback as the message; the last line is its own.
        kind = type(error)
        line = str(error).rstrip().rpartition("\n")[2]
        raise kind(line.removeprefix(f"{kind.__module__}.{kind.__qualname__}: ")) from None


def groups(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """The batches of one step at a time; the last group of an epoch may be smaller."""
    iterator = iter(batches)
    while group := list(itertools.islice(iterator, size)):
        yield group


def _start_worker(_: int) -> None:
    # On a processor that the training fills, an image waits for a gap; the other way round every one
    # of the training's parallel loops would wait for the core that a worker has taken.
    if hasattr(os, "nice"):  # not on Windows
        os.nice(10)
    if process_count() > 1 and hasattr(os, "setpgid"):
        # torchrun signals the whole group; the training needs its workers until all have agreed to stop.
        os.setpgid(0, 0)


@contextlib.contextmanager
def single_threaded_opencv() -> Iterator[None]:
    """Run OpenCV on one thread: its thread pool does not survive a fork, a worker that inherits it hangs.

    The training itself needs the processor, so nothing is lost.
    """
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(threads)
