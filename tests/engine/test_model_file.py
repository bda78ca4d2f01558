"""Reading an exported file: what is ours is loaded, anything else is named in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from anchorline.engine.graph import check_exported, read_model
from anchorline.runtime.io.errors import ArtefactError


@pytest.fixture(scope="module")
def file(exported: Callable[..., onnx.ModelProto], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    onnx.save(exported(), path)
    return path


def test_an_exported_file_is_read(file: Path) -> None:
    model = read_model(file)
    assert check_exported(model).canvas == (128, 160)
    assert model == onnx.load(file)


def foreign_model() -> bytes:
    """A sound ONNX file that is not ours."""
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    other = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [value], [other])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]).SerializeToString()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "the file is empty"),
        (b"not a protobuf at all", "not an ONNX file"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "not an ONNX file"),
        (foreign_model(), "no anchorline contract"),
    ],
)
def test_what_is_not_ours(tmp_path: Path, content: bytes, named: str) -> None:
    path = tmp_path / "other.onnx"
    path.write_bytes(content)
    with pytest.raises(ArtefactError, match=named) as caught:
        read_model(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9, 0.999])
def test_a_file_that_was_cut_off(file: Path, tmp_path: Path, kept: float) -> None:
    content = file.read_bytes()
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(ArtefactError, match=r"cut\.onnx"):
        read_model(cut)


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="no such file"):
        read_model(tmp_path / "missing.onnx")
    with pytest.raises(ArtefactError, match="is a folder"):
        read_model(tmp_path)
