"""A model quantised for TensorRT on its way to the builder: integers stay between half-precision ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from anchorline.data.synthetic import generate_scene
from anchorline.engine.build import build_engine
from anchorline.engine.fp16_range import simulate_half
from anchorline.engine.mixed_precision import PrecisionReport, to_precision
from anchorline.engine.options import BuildOptions
from anchorline.export.quantization import quantize_onnx
from anchorline.runtime.contract import CONTRACT_KEY
from anchorline.runtime.io.images import write_image

Run = Callable[..., dict[str, NDArray[np.generic]]]
_LAYERS = ("Conv", "Gemm")


@pytest.fixture(scope="module")
def quantised(
    exported: Callable[..., onnx.ModelProto], once: Callable[[str, Callable[[Path], None]], Path]
) -> onnx.ModelProto:
    """The small model in symmetric s8 for TensorRT; not to be changed."""

    def make(folder: Path) -> None:
        onnx.save(exported(), folder / "model.onnx")
        images = [str(folder / f"{number}.png") for number in range(2)]
        for number, path in enumerate(images):
            write_image(path, generate_scene(2, (128, 160), number)[0])
        int8 = folder / "int8.onnx"
        quantize_onnx(folder / "model.onnx", int8, images, target="tensorrt", max_drop=1.0, verify=False)

    return onnx.load(once("engine-int8", make) / "int8.onnx")


@pytest.fixture(scope="module")
def mixed(quantised: onnx.ModelProto) -> tuple[onnx.ModelProto, PrecisionReport]:
    return to_precision(quantised, "fp16")


def sources(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {name: node for node in model.graph.node for name in node.output}


def test_no_cast_stands_between_a_layer_and_its_integers(
    quantised: onnx.ModelProto, mixed: tuple[onnx.ModelProto, PrecisionReport]
) -> None:
    """TensorRT takes a layer's integers only straight from DequantizeLinear, of the layer's own precision."""
    model, report = mixed
    onnx.checker.check_model(model, full_check=True)
    scales = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    before, after = integer_layers(quantised), integer_layers(model)
    assert before == after
    assert len(after) > 20
    made = sources(model)
    for name in {name for inputs in after.values() for name in inputs}:
        assert scales[made[name].input[1]] == TensorProto.FLOAT16
    assert not report.kept


def integer_layers(model: onnx.ModelProto) -> dict[str, list[str]]:
    """The inputs of each layer both of whose factors come straight from integers, by the layer's name."""
    made = sources(model)
    return {
        node.name: list(node.input[:2])
        for node in model.graph.node
        if node.op_type in _LAYERS
        and all(name in made and made[name].op_type == "DequantizeLinear" for name in node.input[:2])
    }


def test_the_contract_still_says_integers(mixed: tuple[onnx.ModelProto, PrecisionReport]) -> None:
    text = {p.key: p.value for p in mixed[0].metadata_props}[CONTRACT_KEY]
    assert json.loads(text)["precision"] == "int8"


def test_the_numbers_hold(
    quantised: onnx.ModelProto,
    mixed: tuple[onnx.ModelProto, PrecisionReport],
    exported: Callable[..., onnx.ModelProto],
    run_onnx: Run,
) -> None:
    """From the float model it is hardly further away than the integers alone are.

    Computed as written, in float: integer kernels differ between processors, and some saturate.
    """
    images = np.stack([generate_scene(2, (128, 160), 5)[0]])
    inputs = {"images": images, "image_sizes": np.float32([[128, 160]])}
    names = [n for node in quantised.graph.node for n in node.output if n.startswith("objectness.")]
    assert names
    exact, integer, both = (
        run_onnx(_with_outputs(model, names), inputs, as_written=True)
        for model in (exported(), quantised, simulate_half(mixed[0]))
    )
    errors = [sum(float(np.abs(side[n] - exact[n]).mean()) for n in names) for side in (integer, both)]
    assert errors[0] > 0
    assert errors[1] < 1.5 * errors[0]


def _with_outputs(model: onnx.ModelProto, names: list[str]) -> onnx.ModelProto:
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    del copy.graph.output[:]
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return copy


def test_a_scale_that_half_precision_cannot_hold_keeps_its_layer_in_float(
    quantised: onnx.ModelProto,
) -> None:
    model = onnx.ModelProto.FromString(quantised.SerializeToString())
    name = next(t.name for t in model.graph.initializer if t.name.endswith("fc6.weight_scale"))
    (tensor,) = [t for t in model.graph.initializer if t.name == name]
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1e-6), name))
    _, report = to_precision(model, "fp16")
    assert [(layer.op, layer.reason) for layer in report.kept] == [("DequantizeLinear", "underflow")]


def test_tensorrt_takes_it(rtx: Any, quantised: onnx.ModelProto, tmp_path: Path) -> None:
    """Built, not run. Its size says nothing: TensorRT for RTX 1.7 stores these weights wider than fp16."""
    onnx.save(quantised, tmp_path / "int8.onnx")
    engine = tmp_path / "int8.engine"
    build_engine(
        tmp_path / "int8.onnx", engine, BuildOptions(target="tensorrt-rtx", compute_capabilities=(89,))
    )
    manifest = json.loads((tmp_path / "int8.engine.json").read_text())
    assert manifest["contract"]["precision"] == "int8"
    operators = [layer["type"] for layer in manifest["layers"]]
    assert sum("QUANTIZE" in operator and "DE" not in operator for operator in operators) > 10
