"""The files of a model: found on a worker's machine by path and hash, or sent there once."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from anchorline.cluster.job import ModelFile
from anchorline.runtime.backends.openvino import cache_folder
from anchorline.runtime.io.errors import ArtefactError
from anchorline.runtime.io.files import atomic_path, sha256_of
from anchorline.runtime.tensorrt.engine import onnx_of
from anchorline.runtime.tensorrt.manifest import manifest_path, read_manifest

_KEPT_DIGITS = 40


def model_files(model: str | Path) -> tuple[ModelFile, ...]:
    """The files that ``Detector(model)`` may open, the model first; raises ``ArtefactError``.

    An engine has its manifest and, where it lies beside it, its ONNX file, which stands in for it.
    """
    path = Path(model)
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        raise ArtefactError(
            f"{path}: checkpoints are not run directly; first anchorline export {path} --out model.onnx"
        )
    paths = [path]
    if suffix == ".engine":
        manifest = read_manifest(path)
        paths.append(manifest_path(path))
        with contextlib.suppress(ArtefactError):  # it is needed only where the engine cannot run
            paths.append(onnx_of(path, manifest))
    return tuple(ModelFile(str(each.absolute()), sha256_of(each)) for each in paths)


def find_model(files: Sequence[ModelFile], cache: Path | None = None) -> tuple[Path | None, list[int]]:
    """Where the model can be opened on this machine, and the numbers of the files that are missing.

    All files lie in one folder, since an engine looks for the others beside it: the model's own, if it
    has the same ones here, or the folder in the cache that ``receive_model`` writes.
    """
    if all(_is(Path(each.path), each) for each in files):
        return Path(files[0].path), []
    folder = _folder(files, cache)
    missing = [number for number, each in enumerate(files) if not _is(folder / Path(each.path).name, each)]
    return (None, missing) if missing else (folder / Path(files[0].path).name, [])


def receive_model(
    files: Sequence[ModelFile], contents: dict[int, NDArray[np.uint8]], cache: Path | None = None
) -> Path:
    """Write the files that came, by number, into the cache, and return the model's path there.

    Raises ``OutputError``, and ``ArtefactError`` where a file is not what was announced.
    """
    folder = _folder(files, cache)
    for number, content in contents.items():
        with atomic_path(folder / Path(files[number].path).name) as temporary:
            content.tofile(temporary)
    path, missing = find_model(files, cache)
    if path is None:
        raise ArtefactError(
            f"{files[missing[0]].path}: changed while the run began; start it again when it is complete"
        )
    return path


def _folder(files: Sequence[ModelFile], cache: Path | None) -> Path:
    return (cache or cache_folder().with_name("models")) / files[0].sha256[:_KEPT_DIGITS]


def _is(path: Path, file: ModelFile) -> bool:
    try:
        return sha256_of(path) == file.sha256
    except ArtefactError:
        return False
