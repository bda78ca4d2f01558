"""Several processes that train one model: how they meet and part, what they tell each other, what they share.

Each runs the same command and learns from torchrun's environment which one it is; alone, all of this costs
a look at a variable. When one fails, its own line is the only one: it says so in the store before its
connections close, and whoever waits for it finds that and is quiet. A function that names "all processes"
has to be called by all of them in the same order, or they wait for each other until a timeout.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from anchorline.data.dataset import Dataset
from anchorline.evaluation.evaluation import Detect, report_detections, run_detector
from anchorline.runtime.detections import Detections
from anchorline.runtime.io.errors import SettingsError, TrainingError, reason_of

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

    from anchorline.train.data.dataset import Batch

# No process waits longer for another one. Validation and proposals keep step after every batch; what is
# left are checkpoints, the summary of the data and the metrics, which the main process makes alone.
TIMEOUT = timedelta(minutes=30)

_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_Item = TypeVar("_Item")

# By SIGINT or SIGTERM: all processes raise KeyboardInterrupt the next time they agree on something.
_stop_wanted = False


class OtherProcessError(TrainingError):
    """Another process of the training has failed and reports why; this one has nothing to add."""


class Place(NamedTuple):
    """Which of ``processes`` this one is, among all and on its machine."""

    rank: int = 0
    local_rank: int = 0
    processes: int = 1


def place() -> Place:
    """This process's place by the environment of torchrun; raises ``SettingsError`` for half of one."""
    if os.environ.get("WORLD_SIZE", "1") in ("", "1"):
        return Place()
    missing = [name for name in _VARIABLES if not os.environ.get(name)]
    if missing:
        raise SettingsError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']} and {missing[0]} is not set; expected the environment "
            "of torchrun: start with torchrun -m anchorline train, or unset WORLD_SIZE"
        )
    for name in _VARIABLES[:3]:
        if not os.environ[name].isdecimal():
            raise SettingsError(
                f"{name} is {os.environ[name]!r}; expected a whole number; start with torchrun"
            )
    mine = Place(*(int(os.environ[name]) for name in _VARIABLES[:3]))
    if not mine.rank < mine.processes:
        raise SettingsError(
            f"RANK is {mine.rank}, WORLD_SIZE {mine.processes}; expected a rank from 0 to "
            f"{mine.processes - 1}; start with torchrun"
        )
    return mine


@contextlib.contextmanager
def joined_processes(device: str = "auto") -> Iterator[None]:
    """Train together with the other processes that torchrun has started.

    Inside, SIGINT and SIGTERM stop all processes where they next agree on something; while a process waits
    for the others to join, they end it at once. When one raises, the others raise ``OtherProcessError``.
    Alone, in another such block, and where ``torch.distributed`` is set up already, nothing is done.
    """
    global _stop_wanted
    mine = place()
    if mine.processes == 1 or (dist.is_available() and dist.is_initialized()):
        yield
        return
    # While PyTorch waits in C++, a handler of Python's would wait as long: the system's action ends it.
    with _stop_signals(signal.SIG_DFL, ignored_too=False):
        store = _store(mine)
    try:
        with _stop_signals(signal.SIG_DFL, ignored_too=False):
            # Objects and figures go through gloo on CUDA too, so that they need no room on the GPU.
            backend = "gloo"
            if _uses_cuda(device):
                torch.cuda.set_device(own_cuda_device(device, mine))
                backend = "cpu:gloo,cuda:nccl"
            dist.init_process_group(
                backend, store=store, rank=mine.rank, world_size=mine.processes, timeout=TIMEOUT
            )
        _stop_wanted = False
        with _stop_signals(_want_stop, ignored_too=True):  # none leaves alone in mid-step
            yield
            wait_for_all()
    except BaseException as error:
        is_first_to_end = False
        with contextlib.suppress(RuntimeError):  # the store went with the process that held it
            is_first_to_end = store.add("ended", 1) == 1
        if not is_first_to_end:
            raise OtherProcessError(
                "another process of the training has failed; its message says why"
            ) from error
        # A connection has closed: gloo raises a plain RuntimeError.
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
            raise TrainingError(
                "another process of the training has ended without a message; it was killed, as for want of "
                "memory, or its machine is gone: go on from the last full epoch with --resume"
            ) from None
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _store(mine: Place) -> Store:
    if not dist.is_available():
        raise SettingsError(
            f"WORLD_SIZE is {mine.processes}, and this build of PyTorch is without torch.distributed; "
            "expected one process"
        )
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store, _, _ = next(rendezvous("env://", timeout=TIMEOUT))
    except (RuntimeError, ValueError, OSError) as error:
        raise TrainingError(
            f"process {mine.rank} of {mine.processes} cannot reach the others at {address} "
            f"({reason_of(error, 160)}); check MASTER_ADDR and the network between the machines"
        ) from None
    return PrefixStore(f"anchorline/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _want_stop(*_: object) -> None:
    global _stop_wanted
    _stop_wanted = True


@contextlib.contextmanager
def _stop_signals(handler: Any, *, ignored_too: bool) -> Iterator[None]:
    """Have SIGINT and SIGTERM handled so; one that is ignored (``nohup``) stays so unless ``ignored_too``."""
    kinds = []
    if threading.current_thread() is threading.main_thread():  # which alone may choose
        kinds = [signal.SIGINT, signal.SIGTERM]
    if not ignored_too:
        kinds = [kind for kind in kinds if signal.getsignal(kind) is not signal.SIG_IGN]
    before = {kind: signal.signal(kind, handler) for kind in kinds}
    try:
        yield
    finally:
        for kind, earlier in before.items():
            signal.signal(kind, earlier)


# The device of each process.


def choose_device(name: str) -> torch.device:
    """The device called ``name``; ``auto`` is CUDA where there is one. Raises ``SettingsError``.

    Of several processes each takes the GPU of its rank on the machine.
    """
    if process_count() > 1 and _uses_cuda(name):
        return own_cuda_device(name, place())
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # which the device "meta" cannot
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(
            f"device {name!r} cannot be used ({reason_of(error)}); expected auto, cpu or cuda"
        ) from None
    return device


def _uses_cuda(device: str) -> bool:
    return device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())


def own_cuda_device(device: str, mine: Place) -> torch.device:
    """The GPU of this process, by its rank on the machine; raises ``SettingsError`` without one."""
    if device not in ("auto", "cuda"):
        raise SettingsError(
            f"device is {device!r} for {mine.processes} processes; expected 'cuda', of which each process "
            "takes its own by LOCAL_RANK, or 'cpu'"
        )
    count = torch.cuda.device_count()
    if mine.local_rank >= count:
        raise SettingsError(
            f"process {mine.local_rank} of this machine (from 0) has no GPU of its own, there are {count}; "
            f"expected at most {count} with --nproc-per-node, or --device cpu"
        )
    return torch.device("cuda", mine.local_rank)


# What the processes tell each other.


def process_count() -> int:
    """How many processes train together; 1 without torchrun."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if process_count() > 1 else 0


def is_main() -> bool:
    """Whether this is the one process that writes files and shows progress."""
    return rank() == 0


def wait_for_all() -> None:
    """Go on when all processes are here: what the main one wrote before can be read."""
    if process_count() > 1:
        dist.barrier()


def from_main(make: Callable[[], _Item]) -> _Item:
    """What ``make`` returns in the main process, where alone it is called, in all of them."""
    return cast(_Item, gather(make() if is_main() else None)[0])


def gather(value: _Item) -> list[_Item]:
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
    """The mean of a ``count`` (int64, scalar) over all processes; their sum counts as 1 at least.

    DDP averages gradients: where each process divides the sum of its losses by this mean, the average is
    that of one process with the whole batch. By counts of their own, few samples would weigh more.
    """
    if process_count() == 1:
        return count.clamp(min=1)
    total = count.detach().clone()
    dist.all_reduce(total)
    return total.clamp(min=1) / process_count()


# Detections that all processes share in.


def own_share(items: Sequence[_Item], batch: int) -> list[_Item]:
    """What stands in every ``process_count``-th batch of ``items``, beginning with this process's."""
    starts = range(0, len(items), batch)[rank() :: process_count()]
    return [item for start in starts for item in items[start : start + batch]]


def run_shared(detect: Detect, data: Dataset, batch: int) -> Iterator[Detections]:
    """The results for every image, in order and in all processes, which all have to read to the end.

    Each computes its ``own_share``, in the batches of ``run_detector``: their number changes no result.
    """
    mine = own_share(data.images, batch)
    batches = -(-len(data) // batch)
    for turn in range(-(-batches // process_count())):
        images = tuple(mine[turn * batch : (turn + 1) * batch])
        found = list(run_detector(detect, dataclasses.replace(data, images=images), batch)) if images else []
        for part in gather(found):
            yield from part


def shared_map50(detect: Detect, data: Dataset, batch: int, provider: str) -> float:
    """The mAP50 of ``evaluate``, from detections that all processes share in."""
    found = list(run_shared(detect, data, batch))
    return from_main(lambda: report_detections(found, data, provider).map50)


# One model in all processes.


class _Losses(nn.Module):
    """The losses of a model as a module's forward pass, as DDP wants them."""

    def __init__(self, model: nn.Module, losses: Callable[[Batch], dict[str, Tensor]]) -> None:
        super().__init__()
        self.model, self.losses = model, losses

    def forward(self, batch: Batch | None) -> dict[str, Tensor]:
        if batch is not None:
            return self.losses(batch)
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return {"nothing": 0.0 * torch.stack([parameter.sum() for parameter in trained]).sum()}


def shared_losses(model: nn.Module, losses: Callable[[Batch], dict[str, Tensor]]) -> DistributedDataParallel:
    """``losses`` of ``model`` on each process's part of a batch; the backward pass averages the gradients.

    Divided by ``mean_count``, they have the gradients that one process has with the whole batch.
    """
    # Buffers are the same everywhere, frozen or kept in step by SyncBatchNorm: sending them costs alone.
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    before = "broadcast_buffers"  # the name of older versions of PyTorch
    unsent: dict[str, Any] = {"forward_sync_buffers" if "forward_sync_buffers" in known else before: False}
    parallel = DistributedDataParallel(_Losses(model, losses), **unsent)
    # DDP lays out its buckets anew after the first backward pass, and the last bits of a sum over three
    # processes depend on that: for a resumed run to sum as any other, the first pass does nothing.
    parallel(None)["nothing"].backward()
    parallel.zero_grad(set_to_none=True)
    return parallel


def synchronise_norms(model: nn.Module, device: torch.device) -> None:
    """Have live batch norms take their statistics over all processes, or each would train another model.

    Raises ``SettingsError`` off CUDA, where PyTorch has no such norm.
    """
    live = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.BatchNorm2d  # FrozenBatchNorm derives from it
    ]
    if process_count() == 1 or not live:
        return
    if device.type != "cuda":
        raise SettingsError(
            f"the model has live batch norms, which {process_count()} processes on {device.type} cannot keep "
            "in step (PyTorch does on CUDA alone); expected model.backbone_norm='frozen' and "
            "model.box_convs=0, or one process"
        )
    for parent, name, child in live:
        setattr(parent, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))
