"""The package ``openvino``: whether it is there, and importing it."""

from __future__ import annotations

import functools
import importlib.util
import sys
from typing import Any

_TELEMETRY = "openvino_telemetry"


def has_openvino() -> bool:
    """Whether the package is installed, without importing it."""
    try:
        return importlib.util.find_spec("openvino") is not None
    except (ImportError, ValueError):
        return False


@functools.cache
def load_openvino() -> Any:
    """The package, imported. Raises ``ImportError``.

    Importing it reports to its makers over the network where ``openvino_telemetry`` is importable; running a
    model must tell nobody, so that package is hidden meanwhile and OpenVINO takes its stand-in.
    """
    if "openvino" in sys.modules or _TELEMETRY in sys.modules:
        import openvino

        return openvino
    sys.modules[_TELEMETRY] = None  # type: ignore[assignment]
    try:
        import openvino
    finally:
        del sys.modules[_TELEMETRY]
    return openvino


@functools.cache
def core() -> Any:
    """OpenVINO's entry point, one a process, since each loads its plugins anew."""
    return load_openvino().Core()


def version() -> str:
    """As ``2026.4.1``."""
    return str(load_openvino().__version__).partition("-")[0]
