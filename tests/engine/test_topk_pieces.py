"""TopK in pieces: the same values and indices as one TopK, run by onnxruntime."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx
import onnx.inliner
import pytest
from numpy.typing import NDArray

from anchorline.engine.graph import constants
from anchorline.engine.lowering import split_large_topk
from anchorline.runtime.io.errors import ArtefactError

Run = Callable[[onnx.ModelProto, Mapping[str, NDArray[np.generic]]], dict[str, NDArray[np.generic]]]


def topk_model(k: int, axis: int = 1, attributes: str = "largest = 1, sorted = 1") -> onnx.ModelProto:
    return onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 18]>
        g (float[B, N] x) => (float[B, K] best, int64[B, K] index) {{
            k = Constant <value_ints = [{k}]> ()
            best, index = TopK <axis = {axis}, {attributes}> (x, k)
        }}"""
    )


def ks_of(model: onnx.ModelProto) -> list[int]:
    """The K of every TopK, in order."""
    graph = onnx.inliner.inline_local_functions(model).graph
    values = constants(graph)
    return [int(values[node.input[1]].item()) for node in graph.node if node.op_type == "TopK"]


@pytest.mark.parametrize(("k", "most", "pieces"), [(10, 4, [4, 4, 2]), (8, 4, [4, 4]), (5, 4, [4, 1])])
@pytest.mark.parametrize("axis", [1, -1])
def test_the_pieces_give_what_one_topk_gives(
    run_onnx: Run, k: int, most: int, pieces: list[int], axis: int
) -> None:
    model = topk_model(k, axis)
    rows = np.random.default_rng(0).normal(0, 1, (6, 30)).astype(np.float32)
    rows[1] = np.round(rows[1])  # ties
    rows[2] = 0.0
    rows[3, 3:] = -np.inf
    rows[4] = np.finfo(np.float32).min
    rows[5, ::2] = np.inf
    expected = run_onnx(model, {"x": rows})
    assert split_large_topk(model, most) == 1
    onnx.checker.check_model(model, full_check=True)
    assert ks_of(model) == pieces
    found = run_onnx(model, {"x": rows})
    np.testing.assert_array_equal(found["best"], expected["best"])
    np.testing.assert_array_equal(found["index"], expected["index"])
    assert all(len(set(each.tolist())) == k for each in found["index"])


def test_tensorrt_s_limit_is_kept_and_what_fits_is_left_alone(run_onnx: Run) -> None:
    model = topk_model(6000)
    rows = np.random.default_rng(1).normal(0, 1, (2, 20000)).astype(np.float32)
    expected = run_onnx(model, {"x": rows})
    assert split_large_topk(model) == 1
    assert ks_of(model) == [3840, 2160]
    found = run_onnx(model, {"x": rows})
    np.testing.assert_array_equal(found["best"], expected["best"])
    np.testing.assert_array_equal(found["index"], expected["index"])

    small = topk_model(3840)
    before = small.SerializeToString()
    assert split_large_topk(small) == 0
    assert small.SerializeToString() == before


def test_what_cannot_be_taken_in_pieces() -> None:
    with pytest.raises(ArtefactError, match="largest"):
        split_large_topk(topk_model(9, attributes="largest = 0, sorted = 1"), 4)
    computed = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 18]>
        g (float[B, N] x, int64[1] k) => (float[B, K] best) { best, index = TopK (x, k) }"""
    )
    with pytest.raises(ArtefactError, match="constant"):
        split_large_topk(computed)
