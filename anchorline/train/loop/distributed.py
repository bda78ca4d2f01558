"""What the processes of one training tell each other; alone, all of it costs a look at a variable.

``launch.py`` brings them together. Every function that names "all processes" has to be called by all of
them in the same order, or they wait for each other until a timeout.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

_Value = TypeVar("_Value")

_stop_wanted = False


def process_count() -> int:
    """How many processes train together; 1 without torchrun."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if process_count() > 1 else 0


def is_main() -> bool:
    """Whether this is the one process that writes files and shows progress."""
    return rank() == 0


def want_stop(wanted: bool = True) -> None:
    """Have all processes raise ``KeyboardInterrupt`` the next time they agree on something."""
    global _stop_wanted
    _stop_wanted = wanted


def wait_for_all() -> None:
    """Go on when all processes are here: what the main one wrote before can be read."""
    if process_count() > 1:
        dist.barrier()


@contextlib.contextmanager
def first_on_each_machine(local_rank: int) -> Iterator[None]:
    """Run the block in the first process of each machine, then in the others: a download happens once."""
    if local_rank > 0:
        wait_for_all()
    yield
    if local_rank == 0:
        wait_for_all()


def from_main(make: Callable[[], _Value]) -> _Value:
    """What ``make`` returns in the main process, where alone it is called, in all of them."""
    if process_count() == 1:
        return make()
    box: list[Any] = [make() if is_main() else None]
    dist.broadcast_object_list(box, src=0)
    return cast(_Value, box[0])


def gather(value: _Value) -> list[_Value]:
    """The values of all processes by rank, in all of them; they agree on a stop here."""
    if process_count() == 1:
        return [value]
    everyone: list[Any] = [None] * process_count()
    dist.all_gather_object(everyone, (_stop_wanted, value))
    if any(stop for stop, _ in everyone):
        raise KeyboardInterrupt
    return [each for _, each in everyone]


def mean_of(figures: Mapping[str, float]) -> dict[str, float]:
    """The means over all processes, which give the same names; they agree on a stop here."""
    if process_count() == 1:
        return dict(figures)
    total = torch.tensor([*figures.values(), float(_stop_wanted)], dtype=torch.float64)
    dist.all_reduce(total)
    *means, stops = (total / process_count()).tolist()
    if stops > 0:
        raise KeyboardInterrupt
    return dict(zip(figures, means, strict=True))


def mean_count(count: Tensor) -> Tensor:
    """The mean of a ``count`` (int64, scalar) over all processes, of which one at least is taken as 1.

    DDP averages the gradients of the processes. Where each divides the sum of its losses by this mean, the
    average is the sum over the whole batch divided by the whole count, as in one process with that batch;
    each dividing by its own count would give the images of a process with few samples more weight.
    """
    if process_count() == 1:
        return count.clamp(min=1)
    total = count.detach().clone()
    dist.all_reduce(total)
    return total.clamp(min=1) / process_count()
