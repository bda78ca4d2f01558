"""What the doctor found: a problem or a note, each with its remedy."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """``problem``: something does not work or will break; ``note``: worth knowing, nothing more."""

    level: Literal["problem", "note"]
    text: str
    remedy: str

    def to_json(self) -> dict[str, str]:
        """Plain values for ``files.write_json``."""
        return asdict(self)
