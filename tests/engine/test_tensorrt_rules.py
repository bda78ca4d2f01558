"""The rewrites and the check for TensorRT's parser, on graphs of a few nodes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest

from anchorline.engine.lowering import bake_casts, cast_bytes_first, check_rules
from anchorline.runtime.io.errors import ArtefactError

HEAD = '<ir_version: 10, opset_import: ["" : 18, "other" : 1]>'


def test_bytes_are_cast_before_they_are_moved(run_onnx: Callable[..., dict[str, np.ndarray]]) -> None:
    model = onnx.parser.parse_model(
        HEAD
        + """g (uint8[1, 2, 3] images) => (float[3, 2, 1] a, float[1, 2, 3] b) {
            moved = Transpose (images)
            a = Cast <to = 1> (moved)
            b = Cast <to = 1> (images)
        }"""
    )
    images = np.array([[[0, 127, 255], [1, 2, 3]]], np.uint8)
    expected = run_onnx(model, {"images": images})
    cast_bytes_first(model)
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node if "images" in node.input] == ["Cast"]
    found = run_onnx(model, {"images": images})
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)


def test_bytes_that_something_else_reads_are_refused() -> None:
    model = onnx.parser.parse_model(HEAD + "g (uint8[4] images) => (uint8[4] y) { y = Identity (images) }")
    with pytest.raises(ArtefactError, match="images is uint8 and read by Identity"):
        cast_bytes_first(model)


@pytest.mark.parametrize(("kind", "number"), [("float16", 10), ("float", 1), ("int64", 7)])
def test_a_cast_like_becomes_a_cast(kind: str, number: int) -> None:
    model = onnx.parser.parse_model(
        HEAD + f"g (float[N] x, {kind}[1] like) => ({kind}[N] y) {{ y = CastLike (x, like) }}"
    )
    bake_casts(model)
    onnx.checker.check_model(model, full_check=True)
    (node,) = model.graph.node
    assert (node.op_type, list(node.input), node.attribute[0].i) == ("Cast", ["x"], number)


@pytest.mark.parametrize(
    ("body", "targets"),
    [
        ("y = NonZero (x)", {"tensorrt", "tensorrt-rtx"}),
        ("y = RoiAlign (x, x, x)", {"tensorrt-rtx"}),
        ('y = Resize <mode = "linear", antialias = 1> (x, , x)', {"tensorrt", "tensorrt-rtx"}),
        ('y = Resize <mode = "nearest", antialias = 0> (x, , x)', set()),
        ("y = other.Thing (x)", {"tensorrt", "tensorrt-rtx"}),
        ("y = other.BatchedNMS (x)", set()),
    ],
)
def test_the_first_node_a_target_would_refuse_is_named(body: str, targets: set[str]) -> None:
    model = onnx.parser.parse_model(HEAD + f"g (float[N] x) => (float[M] y) {{ {body} }}")
    model.graph.node[0].name = "culprit"
    for target in ("tensorrt", "tensorrt-rtx"):
        if target in targets:
            with pytest.raises(ArtefactError, match="culprit"):
                check_rules(model, target, {"BatchedNMS"})
        else:
            check_rules(model, target, {"BatchedNMS"})
