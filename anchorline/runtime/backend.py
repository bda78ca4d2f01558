"""What a detector needs from whatever runs the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.canvas import Placement
from anchorline.runtime.contract import Contract

Outputs = Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True)
class LaneResult:
    """The network's ``outputs`` by name, no views of the lane's buffers; seconds by stage."""

    outputs: Outputs
    placements: list[Placement]
    timings: dict[str, float]


class Lane(Protocol):
    """One batch's way through preprocessing and network: buffers of its own, used by one caller at a time."""

    def entered(self) -> AbstractContextManager[None]:
        """What a thread has to be in while it calls the rest; entered again inside, it costs nothing."""
        ...

    def submit(self, frames: Sequence[Any], stream: Any = None) -> None:
        """Take a batch of checked frames. On a GPU this returns while the work goes on.

        ``stream`` is the CUDA stream that device frames become ready on.
        """
        ...

    def collect(self) -> LaneResult:
        """Wait for the batch that was submitted."""
        ...

    def drain(self) -> None:
        """Wait for whatever was submitted, and forget it."""
        ...

    def close(self) -> None:
        """Release the buffers, once nothing runs any more. Safe to call twice."""
        ...


class Backend(Protocol):
    """A loaded network. ``provider`` names the hardware path, ``precision`` the arithmetic.

    ``device_frames`` says whether frames in GPU memory can be handed to its lanes. ``timings`` holds the
    seconds of this thread's last ``infer`` by stage: upload, network, download.
    """

    contract: Contract
    provider: str
    precision: str
    device_frames: bool

    @property
    def timings(self) -> dict[str, float]: ...

    def infer(self, inputs: Outputs) -> dict[str, NDArray[np.generic]]:
        """Run the network on named inputs; returns its outputs by the contract's names."""
        ...

    def create_lane(self) -> Lane:
        """A lane of this network; callable from any thread, one at a time."""
        ...

    def close(self) -> None:
        """Release the network. Safe to call twice."""
        ...
