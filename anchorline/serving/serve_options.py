"""What can be asked of ``serve``: each option written once, for the command and Python."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from anchorline.runtime.io.errors import SettingsError
from anchorline.runtime.video.options import (
    CpuPrecision,
    DetectOptions,
    Option,
    Provider,
    Slices,
    check_fields,
    option_fields,
)

if TYPE_CHECKING:
    from anchorline.runtime.detector import Detector

_MIB = 1 << 20
_stated = {name: about for name, (_, about) in option_fields(DetectOptions).items()}


@dataclass(frozen=True)
class ServeOptions:
    """The options of ``anchorline serve`` and ``InferenceServer``; each says at its field what it means.

    ``provider``, ``score_threshold``, ``threads``, ``cpu_precision`` and ``slices`` are ``Detector``'s.
    Raises ``SettingsError``.
    """

    provider: Annotated[Provider, _stated["provider"]] = "auto"
    score_threshold: Annotated[float | None, _stated["score_threshold"]] = None
    threads: Annotated[int | None, _stated["threads"]] = None
    cpu_precision: Annotated[CpuPrecision, _stated["cpu_precision"]] = "auto"
    slices: Slices = None
    batch: Annotated[int, Option("Frames of different requests detected together at most.", low=1)] = 8
    max_wait: Annotated[
        float, Option("Seconds that a frame waits at most for others of its batch.", low=0)
    ] = 0.002
    queue: Annotated[
        int, Option("Requests in hand at most, for each model; one more is answered 503 at once.", low=1)
    ] = 128
    deadline: Annotated[
        float, Option("Seconds from a whole request to its answer; a later one is 504.", low=0.001)
    ] = 30.0
    body_seconds: Annotated[float, Option("Seconds in which a request's body has to come.", low=0.1)] = 30.0
    max_body: Annotated[int, Option("MiB of a request's body at most.", low=1)] = 64
    memory: Annotated[
        int, Option("MiB of bodies and decoded frames held at once; a request beyond is 503.", low=1)
    ] = 1024

    def __post_init__(self) -> None:
        check_fields(self)
        if self.max_body > self.memory:
            raise SettingsError(
                f"max_body is {self.max_body} MiB and memory {self.memory}; expected a body to fit into it"
            )

    @property
    def body_bytes(self) -> int:
        """``max_body`` in bytes."""
        return self.max_body * _MIB

    @property
    def memory_bytes(self) -> int:
        """``memory`` in bytes."""
        return self.memory * _MIB

    def open_detector(self, model: str | Path) -> Detector:
        """A ``Detector`` of these options."""
        return DetectOptions(
            provider=self.provider,
            score_threshold=self.score_threshold,
            threads=self.threads,
            cpu_precision=self.cpu_precision,
            slices=self.slices,
        ).open_detector(model)
