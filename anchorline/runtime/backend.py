"""What a detector needs from whatever runs the network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.contract import Contract


class Backend(Protocol):
    """A loaded network. ``provider`` names the hardware path, ``precision`` the arithmetic.

    ``timings`` holds the seconds of the last ``infer`` by stage: upload, network, download.
    """

    contract: Contract
    provider: str
    precision: str
    timings: dict[str, float]

    def infer(self, inputs: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        """Run the network on named inputs; returns its outputs by the contract's names."""
        ...

    def close(self) -> None:
        """Release the network. Safe to call twice."""
        ...
