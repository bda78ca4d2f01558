"""The compiled kernels in the package: fresh, complete, and the right one for each GPU."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from anchorline.runtime.io.errors import ArtefactError
from anchorline.runtime.tensorrt import kernels as images
from anchorline.runtime.tensorrt.kernels import compile
from anchorline.runtime.tensorrt.plugins import PLUGINS

ELF = b"\x7fELF"
RECORD = json.loads((images.FOLDER / "kernels.json").read_bytes())


def test_the_images_are_those_of_the_sources() -> None:
    """After a change to a .cu file: python -m anchorline.runtime.tensorrt.kernels.compile."""
    assert RECORD["sources"] == {source: images.source_hash(source) for source in images.SOURCES}
    assert RECORD["options"] == list(compile.OPTIONS)


@pytest.mark.parametrize("source", images.SOURCES)
def test_compiling_again_gives_the_same_images(source: str) -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-bindings")
    try:
        version = f"NVRTC {compile.compiler_version()}"
    except Exception as error:  # cuda-bindings are there, the compiler's library is not
        pytest.skip(f"needs NVRTC ({error})")
    if version != RECORD["compiler"]:
        pytest.skip(f"{version} is here; the images are of {RECORD['compiler']}")
    assert compile.compile_source(source, "sm_86") == images.image(source, 86)
    assert compile.compile_source(source, "compute_75") == images.image(source, 999)


@pytest.mark.parametrize("op", PLUGINS, ids=lambda op: op.name)
@pytest.mark.parametrize("architecture", compile.ARCHITECTURES)
def test_every_architecture_has_its_own_code(op: type, architecture: int) -> None:
    code = images.image(op.source, architecture)
    assert code.startswith(ELF)
    assert all(kernel.encode() in code for kernel in op.kernels)


def test_a_later_gpu_gets_ptx_without_fused_operations() -> None:
    text = images.image("nms", 130).decode().rstrip("\0")
    assert ".target sm_75" in text
    assert "div.rn.f32" in text
    assert "fma.rn.f32" not in text
    assert "div.approx" not in text


def test_an_old_gpu_is_refused() -> None:
    with pytest.raises(ArtefactError, match=r"7\.0; the plugins need 7\.5"):
        images.image("nms", 70)


def test_a_damaged_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(images, "FOLDER", tmp_path)
    images.images.cache_clear()
    (tmp_path / "kernels.zip").write_bytes(b"PK")
    with pytest.raises(ArtefactError, match=r"kernels\.zip: cannot be read"):
        images.image("nms", 86)
    zipfile.ZipFile(tmp_path / "kernels.zip", "w").close()
    with pytest.raises(ArtefactError, match=r"kernels\.zip: cannot be read"):
        images.image("nms", 86)
