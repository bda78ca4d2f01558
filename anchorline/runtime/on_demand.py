"""Packages whose names load when they are first used: importing one costs nothing that is not needed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def on_demand(
    package: str, modules: Mapping[str, str]
) -> tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]:
    """``__all__``, ``__getattr__`` and ``__dir__`` of ``package``, whose names lie in other modules.

    ``modules`` gives for a module, as named from within the package, its names with spaces between. Type
    checkers need the same as imports ``if TYPE_CHECKING``.
    """
    module_of = {name: module for module, names in modules.items() for name in names.split()}

    def get(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f".{module_of[name]}", package), name)

    return list(module_of), get, lambda: sorted({*vars(sys.modules[package]), *module_of})
