"""3x3 convolutions in Winograd's form: PyTorch's sums, on any map, and plain ones again for engines."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import helper, numpy_helper

from anchorline.data.synthetic import CLASS_NAMES, scenes
from anchorline.engine.graph import read_model
from anchorline.export import onnx_export as exporting
from anchorline.export import winograd
from anchorline.export.onnx_export import export_onnx
from anchorline.export.quantization import read_float_model
from anchorline.runtime.backends.cpu_options import network_precision
from anchorline.runtime.backends.onnxruntime import open_for_checks
from anchorline.runtime.contract import WINOGRAD_OP, Contract
from anchorline.runtime.detector import Detector
from anchorline.runtime.io.errors import ArtefactError, SettingsError
from anchorline.runtime.model_file import read_onnx
from anchorline.train.checkpoint import contract_of, save_checkpoint
from anchorline.train.model.faster_rcnn import FasterRCNN
from anchorline.verify.stages import onnx_subject

ToOnnx = Callable[[FasterRCNN, Contract], onnx.ModelProto]


def test_a_tile_is_the_correlation_of_its_window() -> None:
    g, bt, at = (matrix.astype(np.float64) for matrix in winograd.transforms())
    rng = np.random.default_rng(0)
    kernel, window = rng.integers(-9, 10, (3, 3)), rng.integers(-9, 10, (6, 6))
    tile = at @ ((g @ kernel.ravel()) * (bt @ window.ravel()))
    by_hand = [[(kernel * window[y : y + 3, x : x + 3]).sum() for x in range(4)] for y in range(4)]
    np.testing.assert_allclose(tile.reshape(4, 4), by_hand, atol=1e-3)


@pytest.mark.parametrize(
    "shape",
    [(1, 8, 16, 24), (2, 5, 13, 7), (3, 1, 1, 1), (1, 16, 4, 90), (2, 4, 6, 3)],
    ids=lambda shape: "x".join(map(str, shape)),
)
def test_the_function_is_a_convolution(shape: tuple[int, int, int, int]) -> None:
    batch, channels, height, width = shape
    x, w, b = torch.randn(*shape), torch.randn(7, channels, 3, 3), torch.randn(7)
    session = open_for_checks(_one_convolution(w, b, pads=[1, 1, 1, 1]).SerializeToString())
    found = session.run(None, {"x": x.numpy()})[0]
    exact = F.conv2d(x.double(), w.double(), b.double(), padding=1).numpy()
    most = F.conv2d(x.abs(), w.abs(), b.abs(), padding=1).max().item()  # no sum is larger
    assert found.shape == (batch, 7, height, width)
    assert np.abs(found - exact).max() < 1e-5 * most


def _one_convolution(w: torch.Tensor, b: torch.Tensor | None, **attributes: object) -> onnx.ModelProto:
    """A graph of one convolution, in Winograd's form where it can be."""
    inputs = {"w": w} if b is None else {"w": w, "b": b}
    node = helper.make_node("Conv", ["read", *inputs], ["y"], **attributes)
    group = attributes.get("group", 1)
    assert isinstance(group, int)
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["read"]), node],
        "one",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["b", w.shape[1] * group, "h", "w"])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [numpy_helper.from_array(tensor.numpy(), name) for name, tensor in inputs.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winograd, "FEWEST_CHANNELS", 1)
        patch.setattr(winograd, "LEAST_WORK", 1)
        patch.setattr(winograd, "map_sides", lambda model, canvas: {"read": canvas})
        winograd.use_winograd(model, (64, 64))
    return model


@pytest.mark.parametrize(
    ("kernel", "attributes"),
    [
        (3, {"pads": [1, 1, 1, 1], "strides": [2, 2]}),
        (3, {"pads": [2, 2, 2, 2], "dilations": [2, 2]}),
        (3, {"pads": [1, 1, 1, 1], "group": 2}),
        (3, {"pads": [0, 0, 0, 0]}),
        (3, {"pads": [1, 1, 0, 0]}),
        (3, {}),
        (3, {"auto_pad": "SAME_UPPER"}),
        (1, {"pads": [1, 1, 1, 1]}),
        (5, {"pads": [1, 1, 1, 1]}),
    ],
)
def test_other_convolutions_stay_as_they_are(kernel: int, attributes: dict[str, object]) -> None:
    model = _one_convolution(torch.randn(4, 4, kernel, kernel), None, **attributes)
    assert model.graph.node[1].op_type == "Conv"
    assert {each.name for each in model.graph.node[1].attribute} == set(attributes)
    assert not model.functions


def test_only_where_it_gains() -> None:
    """By the channels, and by the map that a canvas gives: P2 of a ResNet-50 does, its P6 does not."""

    def counted(channels: int, sides: tuple[int, int]) -> int:
        node = helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])
        weight = numpy_helper.from_array(np.zeros((channels, channels, 3, 3), np.float32), "w")
        graph = helper.make_graph([node], "one", [], [], [weight])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(winograd, "map_sides", lambda model, canvas: {"x": canvas})
            return winograd.use_winograd(helper.make_model(graph), sides)

    assert counted(256, (200, 272)) == 1
    assert counted(256, (13, 17)) == 0
    assert counted(64, (200, 272)) == 0


@pytest.fixture(scope="module")
def files(
    model_without_ties: FasterRCNN, onnx_of: ToOnnx, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A model exported plainly, and with all its 3x3 convolutions in Winograd's form."""
    folder = tmp_path_factory.mktemp("winograd")
    checkpoint, model = folder / "model.safetensors", model_without_ties
    save_checkpoint(checkpoint, model.state_dict(), model.settings, contract_of(model.settings, CLASS_NAMES))
    plain, fast = folder / "plain.onnx", folder / "fast.onnx"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "to_onnx", onnx_of)
        patch.setattr(winograd, "FEWEST_CHANNELS", 1)
        patch.setattr(winograd, "LEAST_WORK", 1)
        export_onnx(checkpoint, plain, verify=False)
        export_onnx(checkpoint, fast, winograd=True)  # verified
    return plain, fast


def test_the_detections_are_the_plain_file_s(files: tuple[Path, Path]) -> None:
    plain, fast = (Detector(path, provider="cpu") for path in files)
    for frame in (image.load() for image in scenes(plain.contract.names, 2).images):
        ours, theirs = fast(frame), plain(frame)
        assert len(ours) == len(theirs) > 0
        np.testing.assert_allclose(ours.boxes, theirs.boxes, atol=0.01)
        np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-4)


def test_layers_have_their_names_in_a_verification(files: tuple[Path, Path]) -> None:
    with onnx_subject(files[0]) as plain, onnx_subject(files[1]) as fast:
        assert fast.stages.layers == plain.stages.layers


def test_the_engine_builder_reads_plain_convolutions(files: tuple[Path, Path]) -> None:
    plain, fast = (read_model(path) for path in files)
    assert any(node.op_type == WINOGRAD_OP for node in onnx.load(files[1]).graph.node)
    assert not any(node.op_type == WINOGRAD_OP for node in fast.graph.node)
    assert [function.name for function in fast.functions] == [function.name for function in plain.functions]
    ops = [[(node.op_type, len(node.attribute)) for node in model.graph.node] for model in (plain, fast)]
    assert ops[0] == ops[1]


def test_the_contract_says_so_and_keeps_other_arithmetic_away(files: tuple[Path, Path]) -> None:
    contract = read_onnx(files[1]).contract
    assert contract.winograd
    assert contract.source["winograd"] > 0
    assert not read_onnx(files[0]).contract.winograd
    assert network_precision("auto", contract) == network_precision("fp32", contract) == "fp32"
    with pytest.raises(SettingsError, match="Winograd"):
        network_precision("bf16", contract)
    with pytest.raises(ArtefactError, match="without --winograd"):
        read_float_model(files[1], contract)
    assert dataclasses.replace(contract, source={}).winograd is False
