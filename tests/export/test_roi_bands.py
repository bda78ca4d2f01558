"""RoIs of small maps are pooled by matrix products in onnxruntime, and by RoIAlign everywhere else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from anchorline.data.synthetic import CLASS_NAMES, scenes
from anchorline.engine.graph import read_model
from anchorline.export import functions
from anchorline.export.functions import save_model
from anchorline.runtime.backends.onnxruntime import write_inlined
from anchorline.runtime.contract import BANDS_OP, DOMAIN, Contract
from anchorline.runtime.detector import Detector
from anchorline.train.checkpoint import contract_of
from anchorline.train.model.faster_rcnn import FasterRCNN

ToOnnx = Callable[[FasterRCNN, Contract], onnx.ModelProto]


@pytest.fixture(scope="module")
def files(
    model_without_ties: FasterRCNN, onnx_of: ToOnnx, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A file with the products, and the same by RoIAlign."""
    folder = tmp_path_factory.mktemp("bands")
    proto = onnx_of(model_without_ties, contract_of(model_without_ties.settings, CLASS_NAMES))
    assert ops_of(proto) & {BANDS_OP, "RoIAlign"} == {BANDS_OP}
    save_model(proto, folder / "bands.onnx")
    for node in proto.graph.node:
        if node.op_type == BANDS_OP:
            node.op_type = "RoIAlign"
    save_model(proto, folder / "align.onnx")
    return folder / "bands.onnx", folder / "align.onnx"


def ops_of(proto: onnx.ModelProto) -> set[str]:
    return {node.op_type for node in proto.graph.node}


def test_the_detections_are_those_of_roi_align(
    files: tuple[Path, Path], check_same_rows: Callable[..., None]
) -> None:
    frames = [image.load() for image in scenes(CLASS_NAMES, 3).images]
    with Detector(files[0], "cpu") as bands, Detector(files[1], "cpu") as align:
        for frame in frames:
            ours, theirs = (
                np.hstack([found.boxes, found.scores[:, None], found.labels[:, None]]).astype(np.float64)
                for found in (bands(frame), align(frame))
            )
            assert len(theirs) > 5
            check_same_rows(ours, theirs)


def test_other_runtimes_and_engines_take_roi_align(files: tuple[Path, Path], tmp_path: Path) -> None:
    """The inlined graph is the same in every byte as that of the file by RoIAlign."""
    for path in files:
        write_inlined(path, tmp_path / path.name)
        built = read_model(path)
        assert "RoIAlign" in ops_of(built)
        assert not {BANDS_OP} & {*ops_of(built), *(function.name for function in built.functions)}
    bands, align = (onnx.load(tmp_path / path.name) for path in files)
    assert "RoiAlign" in ops_of(bands)
    assert DOMAIN not in {node.domain for node in bands.graph.node}
    assert str(bands.graph) == str(align.graph)


@pytest.mark.parametrize("limit", ["LARGEST_MAP", "MOST_BANDS"])
def test_larger_maps_and_more_rois_keep_roi_align(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    proto = onnx.load(files[1])
    monkeypatch.setattr(functions, limit, 10)
    functions.pool_in_bands(proto, (64, 64), 20)
    assert BANDS_OP not in ops_of(proto)
    monkeypatch.undo()
    functions.pool_in_bands(proto, (64, 64), 20)
    assert BANDS_OP in ops_of(proto)


def test_adaptive_sampling_keeps_roi_align(files: tuple[Path, Path]) -> None:
    """How many points a cell has depends on the RoI there, which a table of one size cannot follow."""
    proto = onnx.load(files[1])
    (node,) = (node for node in proto.graph.node if node.op_type == "RoIAlign")
    next(each for each in node.attribute if each.name == "sampling_ratio").i = 0
    functions.pool_in_bands(proto, (64, 64), 20)
    assert BANDS_OP not in ops_of(proto)
