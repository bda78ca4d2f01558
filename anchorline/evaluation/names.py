"""Class names: one message for a class nobody knows."""

from __future__ import annotations

from collections.abc import Sequence

from anchorline.runtime.errors import DataError

_SHOWN = 12


def list_names(names: Sequence[str]) -> str:
    """The names separated by commas, cut after a dozen."""
    shown = ", ".join(names[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown


def unknown_class(where: str, name: str, names: Sequence[str]) -> DataError:
    """The error for a class in the data that the expected ``names`` do not hold."""
    return DataError(f"{where}: unknown class {name!r}; expected one of {list_names(names)}")
