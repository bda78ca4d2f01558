"""How a detector uses the processor: threads, arithmetic, the cores that detectors of a process share."""

from __future__ import annotations

import contextlib
import os
import platform
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from anchorline.runtime.io.errors import SettingsError, check_choice, check_count

if TYPE_CHECKING:  # the doctor reads this module where the runtime's packages are broken
    from anchorline.runtime.contract import Contract

MOST_THREADS = 1024  # libraries fail without a word of it where they cannot start as many
PRECISIONS = ("auto", "fp32", "bf16")
TUNINGS = ("latency", "throughput")
# Instructions that multiply bfloat16 directly; without one of them it is converted back and forth, which
# is slower than float32.
_BF16_FLAGS = {"avx512_bf16", "amx_bf16"}
_VNNI_FLAGS = {"avx512_vnni", "avx_vnni"}
_X86 = ("x86_64", "amd64", "i686", "x86")
_CPUINFO = Path("/proc/cpuinfo")
_CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")


@dataclass(frozen=True)
class CpuOptions:
    """``threads`` bounds the threads of the network; None: one for each core this process may use.

    ``precision`` is ``auto`` (bf16 where the provider can and the processor computes it natively, fp32
    elsewhere), ``fp32`` or ``bf16``. ``tuning`` is ``latency`` (all threads on one batch) or ``throughput``
    (OpenVINO: as many batches at once as workers ask for, with fewer threads each). Raises ``SettingsError``.
    """

    threads: int | None = None
    precision: str = "auto"
    tuning: str = "latency"

    def __post_init__(self) -> None:
        if self.threads is not None:
            check_count("threads", self.threads, most=MOST_THREADS)
        check_choice("cpu_precision", self.precision, PRECISIONS)
        check_choice("tuning", self.tuning, TUNINGS)

    @property
    def thread_count(self) -> int:
        """The threads to use."""
        return self.threads or usable_cores()


def usable_cores() -> int:
    """The cores that this process may use: by its affinity, in a container by its share of time, and never
    more than ``$OMP_NUM_THREADS``, by which clusters and test runners divide a machine.

    The two threads of one core count once, since they share its arithmetic units.
    """
    return _allowed(_siblings)


def thread_counts() -> tuple[int, ...]:
    """How many threads a network may have here: one for each of ``usable_cores``, which is what it has
    unless told or measured otherwise, and one for each hardware thread of theirs, where that is more."""
    return tuple(dict.fromkeys((usable_cores(), _allowed(str))))


def _allowed(core_of: Callable[[int], str]) -> int:
    """How many cores this process may use, where ``core_of`` says to which one a hardware thread belongs."""
    if hasattr(os, "sched_getaffinity"):
        cores = len({core_of(cpu) for cpu in os.sched_getaffinity(0)})
    else:
        cores = os.cpu_count() or 1
    try:
        quota, period = _CGROUP_QUOTA.read_text(encoding="ascii").split()
        cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError, ZeroDivisionError):  # no such file, or "max": no limit
        pass
    share = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # a list is one number a level
    return min(cores, int(share)) if share.isdecimal() and int(share) else cores


def _siblings(cpu: int) -> str:
    """The hardware threads of the core that ``cpu`` belongs to, as Linux lists them."""
    path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return str(cpu)


def has_native_bf16() -> bool:
    """Whether the processor multiplies bfloat16 natively; False where that cannot be found out."""
    return not _BF16_FLAGS.isdisjoint(cpu_facts().get("flags", "").split())


def adds_in_16_bits() -> bool:
    """Whether integer products are added in 16 bits here, which saturate: on x86 without VNNI.

    True for an x86 processor of which that cannot be found out.
    """
    return platform.machine().lower() in _X86 and _VNNI_FLAGS.isdisjoint(cpu_facts().get("flags", "").split())


def cpu_facts() -> dict[str, str]:
    """What Linux says of the processor, such as its ``flags``; nothing elsewhere."""
    try:
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def network_precision(wanted: str, contract: Contract) -> str:
    """What a provider that knows bf16 computes the model of ``contract`` in.

    Raises ``SettingsError`` for bf16 where the processor lacks it, or the model is none for it.
    """
    if contract.precision != "fp32":  # int8: what is left in float stays exact
        if wanted == "bf16":
            raise SettingsError(
                f"cpu_precision is 'bf16', but the model is {contract.precision}; use auto or fp32"
            )
        return "fp32"
    if contract.winograd:
        if wanted == "bf16":
            raise SettingsError(
                "cpu_precision is 'bf16', but the model's convolutions are in Winograd's form, for fp32; use "
                "auto or fp32, or export it without --winograd"
            )
        return "fp32"
    if wanted == "bf16" and not has_native_bf16():
        raise SettingsError(
            "cpu_precision is 'bf16', but this processor has no instructions for it (avx512_bf16 or "
            "amx_bf16); use auto or fp32"
        )
    return "bf16" if wanted != "fp32" and has_native_bf16() else "fp32"


class CoreBudget:
    """The ``cores`` of this process, lent to its detectors, first come first served; at most all of them.

    Two networks of as many threads as there are cores run no faster side by side than one after the other:
    their threads only evict each other. So each waits here for its cores; small ones run together.
    """

    def __init__(self, cores: int) -> None:
        self._cores = self._free = cores
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()

    @contextlib.contextmanager
    def lent(self, threads: int) -> Iterator[None]:
        """The cores for a network of so many threads, while the block runs. Not to be nested."""
        wanted, place = min(threads, self._cores), object()
        with self._changed:
            self._waiting.append(place)
            try:
                self._changed.wait_for(lambda: self._waiting[0] is place and self._free >= wanted)
                self._free -= wanted
            finally:  # an interrupt while waiting leaves the queue as well
                self._waiting.remove(place)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._free += wanted
                self._changed.notify_all()


_budgets: dict[int, CoreBudget] = {}  # by process, since a fork may inherit a lock that is held


def core_budget() -> CoreBudget:
    """That of this process: the cores that it may use."""
    process = os.getpid()
    return _budgets.get(process) or _budgets.setdefault(process, CoreBudget(usable_cores()))
