"""The house: the package's metadata, its links, its dependencies, and who may import what."""

from __future__ import annotations

import ast
import fnmatch
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import anchorline
from anchorline import cli, console

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "anchorline"
FOLDERS = ("engine", "export", "runtime", "train")
STANDARD_LIBRARY = sys.stdlib_module_names | {"tomllib"}  # tomllib from Python 3.11 on; before it, tomli
DISTRIBUTIONS = {  # where the name of the import is not that of the distribution
    "cuda": "cuda-bindings",
    "cv2": "opencv-python-headless",
    "faster_coco_eval": "faster-coco-eval",
    "google": "protobuf",
    "prometheus_client": "prometheus-client",
    "yaml": "pyyaml",
}
# Installed by the Makefile without what they depend on, so in no extra: the demo's weights, a package that
# asks for a build of OpenCV which would overwrite ours, and TensorRT's Python layer without its libraries.
ALONE = {"deep-sort-realtime", "tensorrt-cu13-bindings", "trackers"}


def run_python(*arguments: str) -> str:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=True, timeout=60
    ).stdout


def make_commands() -> list[str]:
    """The Makefile's lines, continued ones joined."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return re.sub(r"\\\n\s*", "", text).splitlines()


def requirements() -> dict[str, set[str]]:
    """Names of the declared distributions by extra; the base dependencies stand under ``""``."""
    found: dict[str, set[str]] = {}
    for line in importlib.metadata.requires("anchorline") or []:
        name = re.match(r"[A-Za-z0-9._-]+", line)
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", line)
        assert name is not None
        found.setdefault(extra.group(1) if extra else "", set()).add(name.group().lower())
    return found


def imported_packages(path: Path, *, top_only: bool) -> Iterator[str]:
    """Dotted names that a module imports; with ``top_only`` only those that importing it imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


def modules(folder: str) -> list[Path]:
    found = sorted((PACKAGE / folder).rglob("*.py"))
    assert found
    return found


def test_the_installed_version_is_the_package_s() -> None:
    assert importlib.metadata.version("anchorline") == anchorline.__version__


@pytest.mark.parametrize("command", [["-m", "anchorline"], ["-c", "from anchorline.cli import main; main()"]])
def test_the_command_prints_its_version(command: list[str]) -> None:
    assert run_python(*command, "--version") == f"anchorline {anchorline.__version__}\n"


def test_the_console_script_is_the_command() -> None:
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="anchorline")
    assert script.load() is cli.main


def test_importing_the_package_imports_nothing_else() -> None:
    program = "import sys; old = set(sys.modules); import anchorline; print(*sorted(set(sys.modules) - old))"
    assert run_python("-c", program).split() == ["anchorline"]


def test_the_command_line_imports_no_heavy_library_before_a_verb_runs() -> None:
    program = "import sys, anchorline.cli; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = set(run_python("-c", program).split())
    heavy = {"cv2", "matplotlib", "numpy", "onnx", "onnxruntime", "safetensors", "torch", "torchvision"}
    heavy |= {"prometheus_client", "starlette", "uvicorn"}
    assert "typer" in loaded
    assert not loaded & heavy


@pytest.mark.parametrize(
    ("folder", "allowed"),
    [
        ("runtime", ("anchorline.runtime", "cv2", "msgspec", "numpy")),
        ("data", ("anchorline.data", "anchorline.runtime", "cv2", "numpy")),
        ("evaluation", ("anchorline.data", "anchorline.evaluation", "anchorline.runtime", "cv2", "numpy")),
        (
            "verify",
            (
                *("anchorline.data", "anchorline.evaluation", "anchorline.runtime", "anchorline.verify"),
                *("cv2", "numpy"),
            ),
        ),
    ],
)
def test_torch_free_folders_import_only_the_base_at_the_top(folder: str, allowed: tuple[str, ...]) -> None:
    for path in modules(folder):
        for name in imported_packages(path, top_only=True):
            own = any(name == prefix or name.startswith(f"{prefix}.") for prefix in allowed)
            assert own or name.partition(".")[0] in STANDARD_LIBRARY, f"{path.name} imports {name}"


def test_every_imported_library_is_a_declared_dependency() -> None:
    declared = set().union(*requirements().values())
    for path in PACKAGE.rglob("*.py"):
        for name in imported_packages(path, top_only=False):
            package = name.partition(".")[0]
            if package not in {"anchorline", *ALONE, *STANDARD_LIBRARY}:
                assert DISTRIBUTIONS.get(package, package) in declared, f"{path.name} imports {name}"


def test_the_extras_are_there_and_the_base_stays_small() -> None:
    found = requirements()
    assert found[""] == {"msgspec", "numpy", "opencv-python-headless", "rich", "typer"}
    assert found["cpu"] == {"onnxruntime"}
    assert {"evaluate", "gpu", "supervision", "train", "dev"} <= set(found)


@pytest.mark.parametrize(("package", "extra"), sorted(console.EXTRAS.items()))
def test_the_extra_that_an_error_names_brings_the_package(package: str, extra: str) -> None:
    assert DISTRIBUTIONS.get(package, package) in requirements()[extra]


def test_constraints_pin_each_direct_dependency_and_nothing_else() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    form = re.compile(r'([a-z0-9-]+)==[0-9.]+(; python_version (?:>=|<) "3\.\d+")?')
    matches = [form.fullmatch(line) for line in pins]
    assert all(matches), [line for line, match in zip(pins, matches, strict=True) if not match]
    untested = ("gpu", "pycuda")  # not to be installed without a GPU
    direct = set().union(*(names for extra, names in requirements().items() if extra not in untested))
    assert {match.group(1) for match in matches if match} == direct - {"anchorline"} | ALONE
    for package in ALONE:
        (line,) = [line for line in make_commands() if line.endswith(f" {package}")]
        assert "--no-deps" in line


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_links_at_the_root_point_at_the_folders(folder: str) -> None:
    link = ROOT / folder
    assert link.is_symlink()
    assert os.readlink(link) == f"anchorline/{folder}"
    assert (link / "__init__.py").is_file()


def test_no_file_names_a_path_of_somebody_s_machine() -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs git and a clone to know the project's files")
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    files = [ROOT / name for name in names if name and (ROOT / name).is_file()]
    assert ROOT / "pyproject.toml" in files
    machine_path = re.compile(r"(?<![\w.])/(?:home|root|Users|work)/\w+")
    for path in files:
        found = machine_path.search(path.read_bytes().decode("utf-8", errors="ignore"))
        assert found is None, f"{path.relative_to(ROOT)} names {found and found.group()}"


def test_pytest_looks_into_every_folder_of_tests(pytestconfig: pytest.Config) -> None:
    """It passes by folders named ``build``, ``dist`` and the like without a word."""
    skipped = pytestconfig.getini("norecursedirs")
    for path in (ROOT / "tests").rglob("test_*.py"):
        for folder in path.relative_to(ROOT).parts[:-1]:
            assert not any(fnmatch.fnmatch(folder, pattern) for pattern in skipped), f"{path} is never run"
