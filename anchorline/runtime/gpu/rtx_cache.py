"""What TensorRT for RTX compiled for this GPU, kept from one start to the next."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from pathlib import Path
from typing import Any

from anchorline.runtime.engine_manifest import EngineManifest
from anchorline.runtime.errors import OutputError
from anchorline.runtime.files import atomic_write_bytes

log = logging.getLogger("anchorline.runtime")


class RtxCache:
    """A file for each engine, release and kind of GPU. One that cannot be read or written is no error."""

    def __init__(self, manifest: EngineManifest, trt: Any, capability: int) -> None:
        key = f"{manifest.engine_sha256} {trt.__version__} {capability}"
        name = f"rtx-{hashlib.sha256(key.encode()).hexdigest()[:32]}.cache"
        base = os.environ.get("XDG_CACHE_HOME")
        self.path = (Path(base) if base else Path.home() / ".cache") / "anchorline" / name
        self._cache: Any = None
        self._saved: bytes = b""

    def attach(self, config: Any) -> None:
        """Give a context's settings the cache, which is read from its file the first time."""
        if self._cache is None:
            cache = config.create_runtime_cache()
            with contextlib.suppress(OSError):
                content = self.path.read_bytes()
                if cache.deserialize(content):
                    self._saved = content
            self._cache = cache
        config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Write the file if there is anything new."""
        if self._cache is None:
            return
        serialised = self._cache.serialize()
        content = b"" if serialised is None else bytes(serialised)
        if not content or content == self._saved:
            return
        try:
            atomic_write_bytes(self.path, content)
            self._saved = content
        except OutputError as error:
            log.info("the runtime cache of TensorRT for RTX is not kept: %s", error)
