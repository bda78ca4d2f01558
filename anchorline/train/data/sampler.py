"""Which images stand in which batch of an epoch, and in whose part of it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch


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
