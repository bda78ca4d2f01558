"""What an op tells about itself, in terms that know neither TensorRT nor CUDA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

Shape = Sequence[int]


@dataclass(frozen=True)
class Launch:
    """One kernel of ``source``: its grid, threads a block (in one dimension), arguments as ctypes values."""

    source: str
    kernel: str
    grid: tuple[int, int, int]
    threads: int
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Call:
    """The tensors of one execution: shapes of the inputs, their types, and device addresses."""

    shapes: tuple[tuple[int, ...], ...]
    types: tuple[str, ...]
    inputs: tuple[int, ...]
    output: int
    workspace: int = 0


class Op(Protocol):
    """A custom op of the domain ``anchorline`` with one output."""

    name: ClassVar[str]
    attributes: ClassVar[dict[str, type]]  # name -> float or int
    input_count: ClassVar[int]
    output_like: ClassVar[int]  # the input whose type the output has
    source: ClassVar[str]  # of its kernels
    kernels: ClassVar[tuple[str, ...]]

    def __init__(self, **attributes: Any) -> None: ...

    def accepts(self, position: int, types: Sequence[str]) -> bool:
        """Whether the tensor at ``position`` of inputs and output may have the last of ``types``."""
        ...

    def output_shape(self, shapes: Sequence[Sequence[Any]], product: Callable[[Any, Any], Any]) -> list[Any]:
        """The output's shape from the inputs', which may be symbolic; ``product`` multiplies two sides."""
        ...

    def workspace_bytes(self, shapes: Sequence[Shape]) -> int:
        """Scratch memory, in bytes, for inputs of at most ``shapes``."""
        ...

    def launches(self, call: Call) -> list[Launch]:
        """The kernels to run, in order."""
        ...
