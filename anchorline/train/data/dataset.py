"""From labelled images to training batches on the canvas: random views, their order, the loader."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import mmap
import multiprocessing
import os
import pickle
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data import Dataset as TorchDataset
from torchvision import tv_tensors

from anchorline.data.dataset import Dataset
from anchorline.data.proposals import ImageProposals
from anchorline.evaluation.pictures import contact_sheet
from anchorline.runtime.canvas import boxes_to_canvas, place, to_canvas
from anchorline.runtime.contract import ResizeRule
from anchorline.runtime.detections import Detections
from anchorline.runtime.drawing import draw
from anchorline.runtime.io.errors import AnchorlineError, TrainingError, reason_of
from anchorline.train.data.transforms import IGNORE_LABEL, PROPOSAL_LABEL, build_transforms
from anchorline.train.loop.distributed import is_main, process_count, rank
from anchorline.train.model.assign import Targets
from anchorline.train.model.ops import SUPPRESSED
from anchorline.train.model.rpn import Proposals
from anchorline.train.settings import TrainingSettings

_SHARED_MEMORY = "/dev/shm"
_WORKER_DEATH = "DataLoader worker (pid"  # how PyTorch's message begins


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
            indices = [index]
            if self.mosaic > 0 and float(torch.rand(())) < self.mosaic:
                indices += torch.randint(len(self.data), (3,)).tolist()
            return {"seed": seed, **self._lay_out(indices)}

    def _lay_out(self, indices: list[int]) -> dict[str, Any]:
        """One image on the canvas, or four in its quarters."""
        image = np.zeros((*self.canvas, 3), np.uint8)
        side = math.isqrt(len(indices))
        height, width = self.canvas[0] // side, self.canvas[1] // side
        parts, valid = [], self.canvas
        for slot, index in enumerate(indices):
            top, left = slot // side * height, slot % side * width
            view, on_view = self._view(index)
            resize = self.resize if side == 1 else ResizeRule()
            placement = place((view.shape[0], view.shape[1]), (height, width), resize)
            to_canvas(view, placement, image[top : top + height, left : left + width])
            boxes = boxes_to_canvas(on_view["boxes"].as_subclass(Tensor).numpy(), placement)
            moved = torch.from_numpy(boxes + np.array([left, top, left, top], np.float32))
            parts.append((moved, on_view["labels"], on_view["scores"]))
            if side == 1:
                valid = placement.valid
        found, labels, scores = (torch.cat(each) for each in zip(*parts, strict=True))
        item = {
            "image": torch.from_numpy(image),
            "size": torch.tensor(valid, dtype=torch.float32),
            "boxes": found[labels >= 0],
            "labels": labels[labels >= 0],
            "ignored": found[labels == IGNORE_LABEL],
            "id": " + ".join(dict.fromkeys(self.data.images[index].id for index in indices)),
        }
        if self.proposals is not None:
            proposed = labels == PROPOSAL_LABEL
            best = scores[proposed].argsort(descending=True, stable=True)[: self.slots]
            kept_boxes, kept_scores = torch.zeros(self.slots, 4), torch.full((self.slots,), SUPPRESSED)
            kept_boxes[: len(best)] = found[proposed][best]
            kept_scores[: len(best)] = scores[proposed][best]
            item |= {"proposal_boxes": kept_boxes, "proposal_scores": kept_scores}
        return item

    def _view(self, index: int) -> tuple[NDArray[np.uint8], dict[str, Tensor]]:
        """A random view of an image (BGR), and the ``boxes`` on it, their ``labels`` and ``scores``."""
        item = self.data.images[index]
        pixels = item.load()
        boxes, labels = item.boxes, np.where(item.difficult | item.crowd, IGNORE_LABEL, item.labels)
        scores = np.zeros(len(boxes), np.float32)
        if self.proposals is not None:
            stored = self.proposals[index]
            boxes = np.concatenate([boxes, stored.boxes])
            labels = np.concatenate([labels, np.full(len(stored.boxes), PROPOSAL_LABEL)])
            scores = np.concatenate([scores, stored.scores])
        size = (pixels.shape[0], pixels.shape[1])
        target = {
            "boxes": tv_tensors.BoundingBoxes(torch.tensor(boxes), format="XYXY", canvas_size=size),
            "labels": torch.from_numpy(labels),
            "scores": torch.from_numpy(scores),
        }
        image = tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1).flip(0))
        image, target = self.transforms(image, target)
        return image.as_subclass(Tensor).flip(0).permute(1, 2, 0).contiguous().numpy(), target


def collate(items: list[dict[str, Any]]) -> Batch:
    """Join canvases into one batch."""

    def stack(name: str) -> Tensor:
        return torch.stack([item[name] for item in items])

    targets = Targets.pad(
        [item["boxes"] for item in items],
        [item["labels"] for item in items],
        tuple(item["seed"] for item in items),
        [item["ignored"] for item in items],
    )
    stored = "proposal_boxes" in items[0]
    proposals = Proposals(stack("proposal_boxes"), stack("proposal_scores")) if stored else None
    return Batch(stack("image"), stack("size"), targets, tuple(item["id"] for item in items), proposals)


def write_sample_sheet(dataset: CanvasDataset, path: Path, samples: int = 12) -> None:
    """Write the first epoch's views of ``samples`` images, spread over the data, as one picture.

    Regions to ignore are shown as one more class, ``ignored``.
    """
    chosen = np.linspace(0, len(dataset) - 1, min(samples, len(dataset))).astype(int).tolist()
    pictures = []
    for index in chosen:
        item = dataset[0, index]
        names, regions = dataset.data.names, len(item["ignored"])
        labels = np.concatenate([item["labels"].numpy(), np.full(regions, len(names))])
        boxes = Detections(
            boxes=np.concatenate([item["boxes"].numpy(), item["ignored"].numpy()]),
            scores=np.ones(len(labels), np.float32),
            labels=labels,
            class_names=(*names, "ignored"),
        )
        pictures.append(draw(item["image"].numpy(), boxes, scores=False))
    contact_sheet(pictures, path)


# Which images stand in which batch of an epoch, and in whose part of it.


class EpochSampler:
    """Batches of (epoch, index) keys, in an order drawn from (seed, epoch): no image twice in an epoch.

    A batch is shared by ``processes``; this yields the part of number ``rank``. ``batch_sizes`` says how
    many images the batches have.
    """

    def __init__(self, images: int, batch: int, seed: int, rank: int = 0, processes: int = 1) -> None:
        self.images, self.batch, self.seed, self.epoch = images, batch, seed, 0
        self.rank, self.processes = rank, processes
        self.sizes = batch_sizes(images, batch, processes)

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.epoch, -1))
        order = torch.randperm(self.images, generator=generator).tolist()
        start = 0
        for size in self.sizes:
            first, end = (start + size * number // self.processes for number in (self.rank, self.rank + 1))
            yield [(self.epoch, index) for index in order[first:end]]
            start += size


def batch_sizes(images: int, batch: int, processes: int = 1) -> tuple[int, ...]:
    """The number of images in each batch of an epoch.

    Alone, all have ``batch``, and what is left over waits for another epoch: it is other images each time.
    Several ``processes`` see every image: as many batches as that takes, of sizes that differ by one at
    most, so that none is left with a single image, and each with one for every process at least.
    """
    if processes == 1:
        return (min(batch, images),) * max(1, images // batch)
    count = max(1, min(-(-images // batch), images // processes))
    return tuple(images * (number + 1) // count - images * number // count for number in range(count))


def seed_of(seed: int, epoch: int, index: int) -> int:
    """A seed for image ``index`` in ``epoch`` of a training with ``seed``; -1 for the epoch as a whole."""
    return int(np.random.SeedSequence([seed, epoch, index + 1]).generate_state(1, np.uint64)[0] >> 1)


def build_loader(
    dataset: CanvasDataset, settings: TrainingSettings
) -> tuple[DataLoader[dict[str, Any]], EpochSampler]:
    """A loader of this process's part of the batches, and its sampler: set its ``epoch`` before a pass."""
    sampler = EpochSampler(len(dataset), settings.batch, settings.seed, rank(), process_count())
    workers = settings.workers
    # Locks take a page each: eight in common, three of a worker, and some to spare.
    if workers and _free_shared_memory() < mmap.PAGESIZE * 8 * (workers + 1):
        workers = 0
        _tell_of_no_room("workers that load images: the training loads them itself")
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=pack if workers else collate,
        generator=torch.Generator(),  # its own: starting workers takes no number from the training's
        worker_init_fn=_start_worker,
        persistent_workers=workers > 0,
    )
    return loader, sampler


def read_batches(loader: DataLoader[dict[str, Any]]) -> Iterator[Batch]:
    """The batches of one epoch; an image that cannot be read stays an error of one line.

    So does whatever else fails in a worker, as a ``TrainingError``, but for its death (``worker_deaths``).
    """
    if not loader.num_workers:
        yield from loader
        return
    try:
        for packed in loader:
            batch: Batch = pickle.loads(packed)
            if len(packed) > (size := batch.images.nbytes):
                _tell_of_no_room(f"{size / 1e6:.2g} MB from each worker: batches come through slower pipes")
            yield batch
    except Exception as error:
        if str(error).startswith(_WORKER_DEATH):
            raise
        # A worker's exception arrives with its whole traceback as the message; the last line is its own.
        kind = type(error)
        line = str(error).rstrip().rpartition("\n")[2]
        line = line.removeprefix(f"{kind.__module__}.{kind.__qualname__}: ")
        if isinstance(error, AnchorlineError):
            raise kind(line) from None
        raise TrainingError(
            f"loading images has failed in a worker ({kind.__name__}: {line[:200]}); training.workers=0 does "
            "without any, and shows where it fails if it still does"
        ) from error


def pack(items: list[dict[str, Any]]) -> bytes:
    """A batch as a worker hands it over, for ``pickle.loads``: these bytes go through a pipe.

    They name the shared memory that its tensors lie in. Where that has no room for a batch from every worker,
    as in many containers, they hold all of it.
    """
    batch = collate(items)
    worker = get_worker_info()
    wanted = batch.images.nbytes * (worker.num_workers if worker else 1) * process_count()
    # Without room PyTorch fails where nobody hears of it, or before 2.10 dies at the first byte.
    with contextlib.suppress(OSError, RuntimeError):
        if _free_shared_memory() > wanted:
            return bytes(ForkingPickler.dumps(batch))
    return pickle.dumps(batch)


def _free_shared_memory() -> float:
    """Bytes; other systems than Linux have no limit that is known."""
    if sys.platform != "linux":
        return math.inf
    try:
        memory = os.statvfs(_SHARED_MEMORY)
    except OSError:
        return 0.0
    return memory.f_bavail * memory.f_frsize


@functools.cache  # once is enough
def _tell_of_no_room(consequence: str) -> None:
    if is_main():
        print(
            f"{_SHARED_MEMORY} has no room for {consequence}; give a container more with --shm-size",
            file=sys.stderr,
        )


@contextlib.contextmanager
def worker_deaths() -> Iterator[None]:
    """A worker's death, of which PyTorch tells wherever the training stands, as one line."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith(_WORKER_DEATH):
            raise
        raise TrainingError(
            f"a worker that loads images has died ({reason_of(error).partition('. ')[0]}); memory may be "
            "short: lower training.workers (0 does without any), or give a container more with --memory and "
            "--shm-size"
        ) from None


def groups(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """The batches of one step at a time; the last group of an epoch may be smaller."""
    iterator = iter(batches)
    while group := list(itertools.islice(iterator, size)):
        yield group


def _start_worker(_: int) -> None:
    # PyTorch's workers end when they get another parent, which those of a fork server (Python's way from 3.14
    # on) never do: they keep it alive, and it them.
    threading.Thread(target=_end_with_the_training, daemon=True).start()
    # On a processor that the training fills, an image waits for a gap; the other way round every one
    # of the training's parallel loops would wait for the core that a worker has taken.
    if hasattr(os, "nice"):  # not on Windows
        os.nice(10)
    if process_count() > 1 and hasattr(os, "setpgid"):
        # torchrun signals the whole group; the training needs its workers until all have agreed to stop.
        os.setpgid(0, 0)


def _end_with_the_training() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


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
