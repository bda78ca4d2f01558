"""The installed Python packages, read from their metadata and never imported."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from dataclasses import dataclass

_REQUIREMENT_NAME = re.compile(r"[A-Za-z0-9._-]+")


@dataclass(frozen=True)
class Packages:
    """``versions`` by normalised name (lower case, hyphens); ``requirers``: the packages that want one."""

    versions: dict[str, str]
    requirers: dict[str, tuple[str, ...]]


def installed_packages() -> Packages:
    """The distributions on this interpreter's path; of two with one name the first, as an import takes."""
    versions: dict[str, str] = {}
    requirers: dict[str, list[str]] = {}
    for distribution in importlib.metadata.distributions():
        metadata = distribution.metadata
        raw_name, version = metadata["Name"], metadata["Version"]
        if not raw_name or not version or normalised(raw_name) in versions:
            continue  # what a broken uninstall leaves behind has neither
        name = normalised(raw_name)
        versions[name] = version
        for requirement in metadata.get_all("Requires-Dist") or []:
            wanted = _REQUIREMENT_NAME.match(requirement)
            if wanted and "extra ==" not in requirement:
                requirers.setdefault(normalised(wanted.group()), []).append(name)
    return Packages(versions, {name: tuple(sorted(each)) for name, each in requirers.items()})


def normalised(name: str) -> str:
    """A distribution's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def is_importable(module: str) -> bool:
    """Whether there is such a module, without importing it (its parent package is imported)."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: ``(10, 16, 0)`` of ``10.16.0.post1``."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, found.group().split("."))) if found else ()
