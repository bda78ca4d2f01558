"""The compiled kernels: one image for each GPU architecture, and PTX for those that come later.

``kernels.zip`` holds ``<source>.sm_<cc>.cubin`` and ``<source>.compute_75.ptx``; ``kernels.json`` says which
sources and which compiler they come from. ``compile.py`` writes both.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anchorline.runtime.io.errors import ArtefactError

FOLDER = Path(__file__).parent
SOURCES = ("nms", "preprocess", "roi_pool")
PTX_ARCHITECTURE = 75


@dataclass(frozen=True)
class Launch:
    """One kernel of ``source``: its grid, threads a block (in one dimension), arguments as ctypes values."""

    source: str
    kernel: str
    grid: tuple[int, int, int]
    threads: int
    arguments: tuple[Any, ...]


def source_hash(source: str) -> str:
    """The sha256 of a kernel's source file."""
    return hashlib.sha256((FOLDER / f"{source}.cu").read_bytes()).hexdigest()


def image(source: str, architecture: int) -> bytes:
    """The image of ``source`` for a GPU of compute capability ``architecture`` (86 for 8.6).

    The architecture's own code where there is one, else PTX, which the driver compiles when it loads
    it. Raises ``ArtefactError`` for a GPU older than 7.5 and when the package is damaged.
    """
    if architecture < PTX_ARCHITECTURE:
        raise ArtefactError(
            f"the GPU has compute capability {architecture / 10}; the plugins need 7.5 or above"
        )
    every = images(source)
    return every.get(architecture, every[0])


@functools.cache
def images(source: str) -> dict[int, bytes]:
    """All images of ``source`` by architecture; 0 is PTX. Raises ``ArtefactError`` for a damaged package."""
    import zipfile  # here, since an import of the runtime needs no images

    start, ptx = f"{source}.sm_", f"{source}.compute_{PTX_ARCHITECTURE}.ptx"
    try:
        with zipfile.ZipFile(FOLDER / "kernels.zip") as archive:
            cubins = [name for name in archive.namelist() if name.startswith(start)]
            own = {
                int(name.removeprefix(start).removesuffix(".cubin")): archive.read(name) for name in cubins
            }
            return {**own, 0: archive.read(ptx)}
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise ArtefactError(
            f"{FOLDER / 'kernels.zip'}: cannot be read ({error}); install anchorline again"
        ) from None
