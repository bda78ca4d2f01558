"""Compiled networks on disk, so that a model opens at once the second time.

An entry is a file: one line of JSON with the contract and the payload's SHA-256, then the payload. It is
named by the hash of everything that decides it (model, versions, settings), so it never goes stale; the
ones that were not used for longest make room.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from anchorline.runtime.contract import Contract
from anchorline.runtime.errors import AnchorlineError
from anchorline.runtime.files import atomic_path

LIMIT_BYTES = 2 << 30
_LONGEST_HEADER = 1 << 24
_SUFFIX = ".network"

log = logging.getLogger("anchorline.runtime")


class DamagedEntryError(Exception):
    """An entry that is there and cannot be used."""


@dataclass(frozen=True)
class Entry:
    """A compiled network and the contract of the model it was made from."""

    contract: Contract
    payload: bytes


def cache_folder() -> Path:
    """Where compiled networks are kept."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "anchorline" / "networks"


class CompiledCache:
    """The entries in ``folder``, together at most ``limit`` bytes."""

    def __init__(self, folder: Path | None = None, limit: int = LIMIT_BYTES) -> None:
        self._folder, self._limit = folder or cache_folder(), limit

    def path(self, facts: Mapping[str, str]) -> Path:
        """The file for a network that these facts decide."""
        key = hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode()).hexdigest()
        return self._folder / f"{key[:40]}{_SUFFIX}"

    def load(self, path: Path) -> Entry | None:
        """The entry, None where there is none; raises ``DamagedEntryError``."""
        try:
            with path.open("rb") as file:
                header = file.readline(_LONGEST_HEADER)
                payload = file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DamagedEntryError(error.strerror or str(error)) from error
        try:
            fields = json.loads(header)
            contract = Contract.from_json(fields["contract"], where=str(path))
            whole = hashlib.sha256(payload).hexdigest() == fields["sha256"]
        except (ValueError, KeyError, TypeError) as error:  # an ArtefactError is a ValueError
            raise DamagedEntryError("its header cannot be read") from error
        if not whole:
            raise DamagedEntryError("its contents have changed")
        with contextlib.suppress(OSError):
            os.utime(path)  # used just now
        return Entry(contract, payload)

    def store(self, path: Path, entry: Entry) -> None:
        """Keep ``entry`` and make room. Where that cannot be, the log says so and all goes on without."""
        if len(entry.payload) > self._limit:
            return
        header = {
            "contract": entry.contract.to_json(),
            "sha256": hashlib.sha256(entry.payload).hexdigest(),
        }
        try:
            with atomic_path(path) as temporary, temporary.open("wb") as file:
                file.write(json.dumps(header).encode() + b"\n")
                file.write(entry.payload)
        except AnchorlineError as error:
            log.info("the compiled network is not kept: %s", error)
            return
        self._make_room()

    def _make_room(self) -> None:
        with contextlib.suppress(OSError):
            found = [(each.stat(), each) for each in self._folder.glob(f"*{_SUFFIX}")]
            total = sum(stat.st_size for stat, _ in found)
            for stat, path in sorted(found, key=lambda each: each[0].st_mtime):
                if total <= self._limit:
                    break
                path.unlink(missing_ok=True)
                total -= stat.st_size
