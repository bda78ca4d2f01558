"""How a detector uses the GPU."""

from __future__ import annotations

from dataclasses import dataclass


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
