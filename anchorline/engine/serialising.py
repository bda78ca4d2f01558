"""Running TensorRT's builder: profile, progress, timing cache, cancelling."""

from __future__ import annotations

import concurrent.futures
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anchorline.engine.flavours import Toolkit
from anchorline.engine.options import Batch, BuildOptions
from anchorline.runtime.errors import AnchorlineError, SettingsError
from anchorline.runtime.files import atomic_write_bytes
from anchorline.runtime.tensorrt_library import captured_log

Progress = Callable[[int, int], None]
_STEPS = 1000  # of the progress bar
_ACTIVATION = re.compile(r"Total Activation Memory: (\d+) bytes")
_MOST_WARNINGS = 20
_WAKE_S = 0.1


@dataclass(frozen=True)
class Plan:
    """A serialised engine, with what TensorRT said: warnings, and the activation memory it will need."""

    content: bytes
    activation_bytes: int | None
    warnings: tuple[str, ...]


@dataclass
class _Phases:
    """How far a build is: phases with steps, some of which stand for whole phases of their own."""

    steps: dict[str, int] = field(default_factory=dict)
    done: dict[str, int] = field(default_factory=dict)
    parents: dict[str, str | None] = field(default_factory=dict)
    reached: float = 0.0

    def start(self, name: str, parent: str | None, steps: int) -> None:
        self.steps[name], self.done[name], self.parents[name] = max(steps, 1), 0, parent

    def finish(self, name: str) -> None:
        self.steps.pop(name, None)
        self.done.pop(name, None)
        self.parents.pop(name, None)

    def fraction(self) -> float:
        """From 0 to 1, never falling."""
        roots = [name for name, parent in self.parents.items() if parent is None or parent not in self.steps]
        self.reached = max([self.reached, *(self._fraction(name) for name in roots[:1])])
        return min(self.reached, 1.0)

    def _fraction(self, name: str) -> float:
        inside = [self._fraction(child) for child, parent in self.parents.items() if parent == name]
        return min((self.done[name] + max(inside, default=0.0)) / self.steps[name], 1.0)


def serialise(
    toolkit: Toolkit,
    builder: Any,
    network: Any,
    options: BuildOptions,
    batch: Batch,
    timing_cache: Path | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Build ``network``. A Ctrl-C ends the build at TensorRT's next step and is raised again.

    ``timing_cache`` is a folder with one file for each GPU and version. Raises ``AnchorlineError`` with
    TensorRT's reason when the build fails, ``OutputError`` when the timing cache cannot be written.
    """
    config = toolkit.create_config(builder, options)
    if batch[0] != batch[2]:
        config.add_optimization_profile(_profile(builder, network, batch))
    cache_file = None if timing_cache is None else _load_timing_cache(toolkit, config, timing_cache)
    cancelled = threading.Event()
    failures: list[BaseException] = []
    config.progress_monitor = monitor = _monitor(toolkit.trt, progress, cancelled, failures)
    with captured_log() as records:
        plan = _run(lambda: builder.build_serialized_network(network, config), cancelled)
    del monitor  # until here TensorRT has held no reference of its own
    if failures:
        raise failures[0]
    texts = [(record.levelname, " ".join(record.getMessage().split())) for record in records]
    if plan is None:
        reason = next((text for level, text in reversed(texts) if level == "ERROR"), "no reason given")
        raise AnchorlineError(f"{toolkit.title} {toolkit.version} could not build the engine: {reason}")
    if cache_file is not None:
        atomic_write_bytes(cache_file, bytes(config.get_timing_cache().serialize()))
    found = [match for _, text in texts for match in _ACTIVATION.findall(text)]
    warnings = [text for level, text in texts if level == "WARNING"]
    return Plan(bytes(plan), int(found[-1]) if found else None, _readable(warnings))


def _run(build: Callable[[], Any], cancelled: threading.Event) -> Any:
    """Build in a thread of its own, so that this one hears Ctrl-C at once and can pass it on."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        running = pool.submit(build)
        try:
            while not concurrent.futures.wait([running], timeout=_WAKE_S).done:
                pass  # Windows delivers a Ctrl-C only between two waits
            return running.result()
        except BaseException:
            cancelled.set()  # leaving the block waits for the thread
            raise


def _profile(builder: Any, network: Any, batch: Batch) -> Any:
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        rest = tuple(tensor.shape)[1:]
        profile.set_shape(tensor.name, *((size, *rest) for size in batch))
    return profile


def _monitor(
    trt: Any, progress: Progress | None, cancelled: threading.Event, failures: list[BaseException]
) -> Any:
    """TensorRT's progress monitor. An error of ``progress`` ends the build and is kept in ``failures``."""
    phases = _Phases()

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            phases.start(phase_name, parent_phase, num_steps)

        def phase_finish(self, phase_name: str) -> None:
            phases.finish(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            """False ends the build."""
            if phase_name in phases.done:
                phases.done[phase_name] = step + 1
            try:
                if progress is not None:
                    progress(int(phases.fraction() * _STEPS), _STEPS)
            except BaseException as error:
                failures.append(error)
                cancelled.set()
            return not cancelled.is_set()

    return Monitor()


def _load_timing_cache(toolkit: Toolkit, config: Any, folder: Path) -> Path:
    """Give ``config`` the timings of earlier builds on this GPU with this version; returns their file."""
    if toolkit.gpu is None:
        raise SettingsError(
            f"timing cache is {str(folder)!r}; {toolkit.title} times nothing when it builds, leave it out"
        )
    gpu = re.sub(r"[^A-Za-z0-9]+", "-", toolkit.gpu)
    file = folder / f"{toolkit.name}-{toolkit.version}-{gpu}.cache"
    content = file.read_bytes() if file.is_file() else b""
    cache = config.create_timing_cache(content)
    if not config.set_timing_cache(cache, ignore_mismatch=False):
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    return file


def _readable(warnings: Sequence[str]) -> tuple[str, ...]:
    """Each warning once, with how often it came."""
    counts: dict[str, int] = {}
    for text in warnings:
        counts[text] = counts.get(text, 0) + 1
    lines = [text if count == 1 else f"{text} ({count} times)" for text, count in counts.items()]
    rest = len(lines) - _MOST_WARNINGS
    return (*lines[:_MOST_WARNINGS], *([f"... and {rest} more"] if rest > 0 else []))
