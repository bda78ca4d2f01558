"""What Python users import by name: there when it is first used, and light until then."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys

import pytest

HEAVY = ("torch", "torchvision", "matplotlib", "onnx", "faster_coco_eval", "pycocotools")


def loaded_by(program: str) -> set[str]:
    """The modules that are loaded when ``program`` has run."""
    code = f"{program}; import sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("program", "module"),
    [
        ("import anchorline.verify as package", "anchorline.artefacts"),
        ("import anchorline.evaluation as package", "anchorline.evaluation.evaluation"),
    ],
)
def test_a_package_loads_its_functions_when_they_are_used(program: str, module: str) -> None:
    name = "verify" if "verify" in program else "evaluate"
    assert module not in loaded_by(program)
    used = loaded_by(f"{program}; assert callable(package.{name}) and '{name}' in package.__all__")
    assert module in used
    assert not used & set(HEAVY)


@pytest.mark.parametrize(
    "program",
    [
        "from anchorline.verify import verify; from anchorline.evaluation import evaluate",
        "from anchorline.evaluation import evaluate; import anchorline.evaluation.metrics",
        "from anchorline.verify import verify; import anchorline.verify.verification",
    ],
)
def test_no_module_takes_the_place_of_a_function(program: str) -> None:
    imported = program.partition("import ")[2].partition(";")[0]
    assert not loaded_by(f"{program}; assert callable({imported})") & set(HEAVY)


@pytest.mark.parametrize("package", ["verify", "evaluation"])
def test_a_name_that_is_not_there(package: str) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        loaded_by(f"import anchorline.{package}; anchorline.{package}.nonsense")


@pytest.mark.parametrize(
    "package", ["deploy", "engine", "evaluation", "export", "runtime", "train", "verify"]
)
def test_type_checkers_are_told_what_is_there(package: str) -> None:
    """Each name stands twice, as an import that only they read and by its module: both give the same."""
    loaded = importlib.import_module(f"anchorline.{package}")
    (guard,) = (node for node in ast.parse(inspect.getsource(loaded)).body if isinstance(node, ast.If))
    told = {alias.asname: node.module for node in guard.body for alias in node.names}
    assert sorted(told) == sorted(loaded.__all__)
    assert set(told) <= set(dir(loaded))
    for name, module in told.items():
        assert getattr(loaded, name) is getattr(importlib.import_module(module), name)
