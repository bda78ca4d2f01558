"""How the processes of one training find each other, as torchrun starts them, and end together.

Each process runs the same command; torchrun's environment variables tell it which one it is. They talk
through gloo, on CUDA through NCCL besides. When one of them fails, its own line is the only one: it says
so in the store before its connections close, and whoever waits for it finds that and is quiet.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from anchorline.runtime.io.errors import SettingsError, TrainingError
from anchorline.train.loop.distributed import wait_for_all, want_stop

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

# No process waits longer for another one. Validation and proposals keep step after every batch; what is
# left are checkpoints, the summary of the data and the metrics, which the main process makes alone.
TIMEOUT = timedelta(minutes=30)

_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_ENDED = "ended"


class OtherProcessError(TrainingError):
    """Another process of the training has failed and reports why; this one has nothing to add."""


@dataclass(frozen=True)
class Place:
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
    rank, local_rank, processes = (_whole_number(name) for name in _VARIABLES[:3])
    if not rank < processes:
        raise SettingsError(
            f"RANK is {rank}, WORLD_SIZE {processes}; expected a rank from 0 to {processes - 1}; "
            "start with torchrun"
        )
    return Place(rank, local_rank, processes)


def _whole_number(name: str) -> int:
    text = os.environ[name]
    if not text.isdecimal():
        raise SettingsError(f"{name} is {text!r}; expected a whole number; start with torchrun")
    return int(text)


@contextlib.contextmanager
def joined_processes(device: str = "auto") -> Iterator[None]:
    """Train together with the other processes that torchrun has started; alone, do nothing.

    Inside, SIGINT and SIGTERM stop all processes where they next agree on something; while a process waits
    for the others to join, they end it at once. When one process raises, the others raise
    ``OtherProcessError``, and all leave together otherwise. Inside another such block, or where the caller
    has set up ``torch.distributed`` itself, nothing is done either.
    """
    mine = place()
    if mine.processes == 1 or (dist.is_available() and dist.is_initialized()):
        yield
        return
    with _signals_end_at_once():
        store = _store(mine)
    try:
        with _signals_end_at_once():
            _join(store, mine, device)
        with _stops_together():
            yield
            wait_for_all()
    except BaseException as error:
        if not _is_first_to_end(store):
            raise OtherProcessError(
                "another process of the training has failed; its message says why"
            ) from error
        if _lost_another(error):
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
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise TrainingError(
            f"process {mine.rank} of {mine.processes} cannot reach the others at {address} ({reason}); "
            "check MASTER_ADDR and the network between the machines"
        ) from None
    return PrefixStore(f"anchorline/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _join(store: Store, mine: Place, device: str) -> None:
    on_cuda = uses_cuda(device)
    if on_cuda:
        torch.cuda.set_device(own_cuda_device(device, mine))
    # Objects and figures go through gloo in either case, so that they need no room on the GPU.
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_cuda else "gloo",
        store=store,
        rank=mine.rank,
        world_size=mine.processes,
        timeout=TIMEOUT,
    )


def uses_cuda(device: str) -> bool:
    """Whether ``--device`` ``device`` means a GPU here."""
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


@contextlib.contextmanager
def _stops_together() -> Iterator[None]:
    """Turn SIGINT and SIGTERM into a wish to stop: one process alone must not leave in mid-step."""
    want_stop(False)
    with _handlers(dict.fromkeys((signal.SIGINT, signal.SIGTERM), lambda *_: want_stop())):
        yield


@contextlib.contextmanager
def _signals_end_at_once() -> Iterator[None]:
    """Give SIGINT and SIGTERM the system's action: Python's would wait as long as PyTorch's C++ does.

    A signal that is ignored, as in a job of ``nohup``, stays so.
    """
    kinds = (signal.SIGINT, signal.SIGTERM)
    heard = [kind for kind in kinds if signal.getsignal(kind) is not signal.SIG_IGN]
    with _handlers(dict.fromkeys(heard, signal.SIG_DFL)):
        yield


@contextlib.contextmanager
def _handlers(handlers: dict[signal.Signals, Any]) -> Iterator[None]:
    """Have signals handled so; in the main thread, which alone may choose."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {kind: signal.signal(kind, handler) for kind, handler in handlers.items()}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def _is_first_to_end(store: Store) -> bool:
    try:
        return store.add(_ENDED, 1) == 1
    except RuntimeError:  # the store went with the process that held it
        return False


def _lost_another(error: BaseException) -> bool:
    """Whether ``error`` says that a connection has closed: gloo raises a plain ``RuntimeError``."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
