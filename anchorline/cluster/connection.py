"""Joining a Ray cluster, or starting one on this machine alone; and what Ray says, in a few words."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

from anchorline.runtime.backends.cpu_options import usable_cores
from anchorline.runtime.io.errors import AnchorlineError, SettingsError, one_line
from anchorline.runtime.io.files import is_alive, process_state

LOCAL, AUTO = "local", "auto"
_ADDRESS = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:]+\]):\d{1,5}")
_REACH_SECONDS = 5.0  # Ray itself tries for a minute
_PULSE_SECONDS = 1.0  # between two looks at whether the cluster is there, and as long for each
_LOST_SECONDS = 3.0  # without an answer; to end a cluster without a head takes Ray some seven more
_OBJECT_STORE = 200 << 20  # bytes: what travels is small, and the default takes a third of the memory
_CORES = 4  # of a worker: more of them gain little for a network on one frame
_ERROR_LINE = re.compile(r"^\s*(\w+(?:\.\w+)*(?:Error|Exception): .+)$", re.MULTILINE)

log = logging.getLogger("anchorline.cluster")


class ClusterError(AnchorlineError, RuntimeError):
    """A Ray cluster that cannot be reached, or whose workers cannot be started."""


def check_address(address: str) -> None:
    """Raise ``SettingsError`` for what can be no cluster, and where Ray is not installed."""
    if address.startswith("ray://"):
        raise SettingsError(
            f"{address}: Ray Client is not supported; run the command on a machine of the cluster, with "
            "--ray auto"
        )
    if address not in (LOCAL, AUTO) and not _ADDRESS.fullmatch(address):
        raise SettingsError(f"--ray is {address!r}; expected local, auto or the HOST:PORT of a cluster")
    _import_ray(address)


@contextlib.contextmanager
def connected(address: str, cores: int | None = None) -> Iterator[Any]:
    """The package ``ray`` while the block runs, as a part of the cluster at ``address``.

    A cluster that this process has joined already stays joined. ``local`` starts one on the loopback
    address, with ``cores`` or those there are, which ends with the block. Raises ``ClusterError``.
    """
    ray = _import_ray(address)
    joined_before = ray.is_initialized()
    # Results go to stdout, and nothing of Ray's among them; we tell of dead workers ourselves.
    with contextlib.redirect_stdout(cast(IO[str], _WithoutRay(sys.stdout))):
        if not joined_before:
            _join(ray, address, cores or usable_cores())
        try:
            yield ray
        finally:
            if not joined_before:
                below = _below_raylet()
                ray.shutdown()
                for pid, begun in below:  # which are slow to notice, or do not without a head
                    if is_alive(pid, begun):
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)


class Pulse:
    """Whether the head of the cluster that ``ray`` has joined answers, and Ray's process on this machine.

    Ray says nothing where they do not: it waits a minute for a head and then ends the process that it runs
    in, and it waits for ever for new workers where its own process here has died.
    """

    def __init__(self, ray: Any) -> None:
        context = ray.get_runtime_context()
        (here,) = (node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
        self._places = {
            context.gcs_address: "its head",
            f"{here['NodeManagerAddress']}:{here['NodeManagerPort']}": "Ray's process on this machine",
        }
        self._silent_since: dict[str, float] = {}
        self._looked = time.monotonic()

    def check(self) -> None:
        """Look at most once a second; raises ``ClusterError`` where one has not answered for some seconds."""
        now = time.monotonic()
        if now - self._looked < _PULSE_SECONDS:
            return
        self._looked = now
        for place, name in self._places.items():
            reason = _cannot_reach(place, _PULSE_SECONDS)
            if reason is None:
                self._silent_since.pop(place, None)
            elif now - self._silent_since.setdefault(place, now) >= _LOST_SECONDS:
                raise ClusterError(
                    f"the cluster is lost: {name} ({place}) does not answer any more ({reason}); see to it "
                    "and start again"
                )


def _cannot_reach(address: str, seconds: float) -> str | None:
    """Why no connection to ``HOST:PORT`` can be made; None where one can."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=seconds).close()
    except (OSError, OverflowError) as error:
        return str(error)
    return None


def share_out(nodes: Iterable[Mapping[str, Any]], provider: str, threads: int | None) -> tuple[int, int, int]:
    """The CPUs and GPUs that a worker takes, and how many such workers the ``nodes`` of Ray hold.

    A GPU each where the provider is one's, or may become one's and the cluster has some; else as many
    cores as ``threads``, by default four, or what the smallest machine has. Raises ``SettingsError``
    where no machine has so much.
    """
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    cores = [int(node.get("CPU", 0)) for node in alive]
    gpus = [int(node.get("GPU", 0)) for node in alive]
    needs_gpu = provider in ("cuda", "tensorrt", "tensorrt-rtx")
    if needs_gpu and not any(gpus):
        raise SettingsError(f"provider is {provider!r}, but the cluster offers no GPU")
    on_gpu = needs_gpu or (provider == "auto" and any(gpus))
    smallest = min(filter(None, cores), default=1)
    each = threads or (1 if on_gpu else min(_CORES, smallest))
    room = sum(
        min(cpus // each, gpu) if on_gpu else cpus // each for cpus, gpu in zip(cores, gpus, strict=True)
    )
    if not room:
        raise SettingsError(
            f"a worker needs {each} CPUs{' and a GPU' if on_gpu else ''}, and the largest machine of the "
            f"cluster has {max(cores, default=0)}; lower --threads"
        )
    return each, int(on_gpu), room


def _import_ray(address: str) -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address == LOCAL and "ray" not in sys.modules:
        # Ray has no other switch for a cluster that listens on the loopback address only.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
    except ImportError as error:
        raise SettingsError(f"--ray needs the package ray ({error}); pip install 'anchorline[ray]'") from None
    return ray


def _join(ray: Any, address: str, cores: int) -> None:
    if _ADDRESS.fullmatch(address) and (reason := _cannot_reach(address, _REACH_SECONDS)):
        raise ClusterError(
            f"--ray {address}: nobody answers there ({reason}); give the address that ray start has printed"
        )
    settings: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}
    if address == LOCAL:
        settings |= {"num_cpus": cores, "include_dashboard": False, "object_store_memory": _OBJECT_STORE}
    handler = signal.getsignal(signal.SIGTERM)
    try:
        try:
            ray.init(**settings)
        except Exception as error:
            if "timed out during startup" not in str(error):
                raise
            ray.shutdown()  # a machine under load was too slow for the half minute that Ray grants
            ray.init(**settings)
    except ConnectionError as error:
        text = "start one with ray start --head, or take --ray local"
        if address != AUTO:  # for an address that is given Ray does not look for its token by itself
            text = "set RAY_AUTH_MODE=token where it was started with a token"
        raise ClusterError(
            f"--ray {address}: no cluster is to be reached ({one_line(error)}); {text}"
        ) from None
    except Exception as error:  # Ray raises many kinds, RuntimeError for another version of itself
        raise ClusterError(f"--ray {address}: the cluster cannot be joined ({one_line(error)})") from error
    finally:
        if threading.current_thread() is threading.main_thread():  # Ray puts its own in the place of ours
            signal.signal(signal.SIGTERM, handler)


def _below_raylet() -> list[tuple[int, str]]:
    """The workers and agents of a cluster that this process has started: their ids, and when they began."""

    def children(pid: int) -> list[int]:
        found: list[int] = []
        for path in Path(f"/proc/{pid}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found += map(int, path.read_text(encoding="ascii").split())
        return found

    names = {pid: process_state(pid) for pid in children(os.getpid())}
    raylets = [pid for pid, state in names.items() if state and state.name == "raylet"]
    below = {pid: process_state(pid) for raylet in raylets for pid in children(raylet)}
    return [(pid, state.begun) for pid, state in below.items() if state]


class _WithoutRay:
    """stdout for everybody but Ray's threads, which print there what goes wrong on the cluster."""

    def __init__(self, real: IO[str]) -> None:
        self._real = real

    def write(self, text: str) -> int:
        if threading.current_thread().name.startswith("ray_"):
            log.debug("%s", text.rstrip())
            return len(text)
        return self._real.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def why_dead(error: BaseException) -> str:
    """Ray's page about a dead actor as a few words."""
    text = str(error)
    if "OutOfMemoryError" in text or "running low on memory" in text:  # all pages muse about the OOM killer
        return "out of memory"
    if raised := _ERROR_LINE.findall(text):
        return str(raised[-1]).strip()
    if "node" in text.lower() and "died" in text and "worker process has died" not in text:
        return "its machine is lost"
    return "its process ended"
