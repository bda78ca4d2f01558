"""How a detector uses the GPU."""

from __future__ import annotations

from dataclasses import dataclass

from anchorline.runtime.io.errors import SettingsError


@dataclass(frozen=True)
class GpuOptions:
    """``device`` is the number of the GPU, ``cuda`` the package to reach it through (``cuda.CUDA_PACKAGES``).

    ``graph`` captures CUDA graphs: by default for engines, not in onnxruntime. ``timings`` measures stages
    by CUDA events.
    """

    device: int = 0
    cuda: str = "cuda-bindings"
    graph: bool | None = None
    timings: bool = False

    def check(self) -> None:
        """Raise ``SettingsError`` for values that make no sense."""
        if isinstance(self.device, bool) or not isinstance(self.device, int) or self.device < 0:
            raise SettingsError(f"device is {self.device!r}; expected the number of a GPU, from 0")
        if self.graph not in (None, True, False):
            raise SettingsError(f"graph is {self.graph!r}; expected True, False or None")
        if self.timings not in (True, False):
            raise SettingsError(f"timings is {self.timings!r}; expected True or False")
