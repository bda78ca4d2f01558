"""What is handed over, an exported ONNX file or an engine, and the folder that it goes to."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from anchorline import __version__
from anchorline.runtime.canvas import CanvasRange
from anchorline.runtime.contract import Contract
from anchorline.runtime.io.errors import ArtefactError, OutputError, SettingsError
from anchorline.runtime.io.files import files_below, hidden_folder, output_errors, sha256_of
from anchorline.runtime.model_file import read_onnx
from anchorline.runtime.tensorrt.manifest import EngineManifest, read_manifest

_LONGEST_NAME = 100


@dataclass(frozen=True)
class Source:
    """A model file that can be handed over. ``manifest`` is an engine's, None for an ONNX file."""

    path: Path
    contract: Contract
    manifest: EngineManifest | None = None

    @property
    def name(self) -> str:
        """The file's, in the letters that servers and file names take everywhere."""
        plain = re.sub(r"[^A-Za-z0-9_-]+", "_", self.path.stem).strip("_")[:_LONGEST_NAME]
        return plain or "model"

    @property
    def canvases(self) -> tuple[CanvasRange, ...]:
        """Those of each of an engine's profiles; none for an ONNX file, which takes its contract's or any."""
        return () if self.manifest is None else self.manifest.canvases


def open_source(model: str | Path) -> Source:
    """The file, checked as ``Detector`` checks it; raises ``ArtefactError``."""
    path = Path(model)
    match path.suffix.lower():
        case ".onnx":
            found = read_onnx(path)
            found.check()
            return Source(path, found.contract)
        case ".engine":
            manifest = read_manifest(path)
            return Source(path, manifest.contract, manifest)
        case ".safetensors":
            raise ArtefactError(
                f"{path}: is a checkpoint, expected an .onnx or .engine file; anchorline export it first"
            )
    raise ArtefactError(
        f"{path}: expected an .onnx file of anchorline export or an .engine of anchorline build"
    )


def batch_limit(source: Source, asked: int | None, default: int) -> int:
    """The largest batch: ``asked``, or the model's own, or ``default`` where that is free."""
    most = source.contract.max_batch if source.manifest is None else source.manifest.batch[2]
    if asked is not None and most is not None and asked > most:
        raise SettingsError(f"max batch is {asked}; {source.path.name} takes at most {most} at a time")
    return asked or most or default


@contextlib.contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """The folder ``out``, put in its place when the block has filled it: whole or not at all.

    Raises ``OutputError`` where there is something already, other than an empty folder.
    """
    target = Path(out)
    with output_errors(target):
        if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
            raise OutputError(f"{target}: is there already; remove it, or give another folder")
        with hidden_folder(target.absolute().parent) as hidden:
            draft = hidden / target.absolute().name
            draft.mkdir()
            yield draft
            os.replace(draft, target)  # an empty folder may be replaced


def origin(source: Source) -> str:
    """Where the folder's content comes from, as a line of its README."""
    kind = source.manifest
    built = "" if kind is None else f", TensorRT {kind.flavour_version}, {kind.precision}"
    return f"`{source.path.name}` (SHA-256 `{sha256_of(source.path)}`{built}), by anchorline {__version__}"


def hashes(folder: Path) -> str:
    """The SHA-256 of every file below ``folder`` as a table."""
    rows = [
        f"| `{path.relative_to(folder).as_posix()}` | `{sha256_of(path)}` |" for path in files_below(folder)
    ]
    return "\n".join(("| file | SHA-256 |", "|---|---|", *rows))


def template(name: str) -> str:
    """The text of a file of ``templates/``, by its name in the folder that is handed over."""
    return (Path(__file__).parent / "templates" / f"{name}.txt").read_text(encoding="utf-8")
