"""Whole models as ONNX: the same results in onnxruntime as in PyTorch, and nothing else in the file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from anchorline.data.synthetic import CLASS_NAMES
from anchorline.runtime.contract import BANDS_OP, CONTRACT_KEY, Contract
from anchorline.train.checkpoint import contract_of
from anchorline.train.model.faster_rcnn import FasterRCNN, run_task

NAMES = ("cat", "dog", "bird")
# An export takes up to ten seconds; these are exports that other tests need, too. The RPN of the pyramid is
# part of the first one.
CASES = (
    ("fpn", "detections"),
    ("without ties", "detections"),
    ("single", "proposals"),
    pytest.param("single", "detections", marks=pytest.mark.slow),
)
Outputs = dict[str, NDArray[np.generic]]


@dataclass(frozen=True)
class Exported:
    """A model, its ONNX form, and an onnxruntime session of it."""

    task: str
    model: FasterRCNN
    contract: Contract
    proto: onnx.ModelProto
    session: onnxruntime.InferenceSession

    def in_pytorch(self, images: NDArray[np.uint8], sizes: NDArray[np.float32]) -> Outputs:
        with torch.no_grad():
            found = run_task(self.model, self.task, torch.from_numpy(images), torch.from_numpy(sizes))
        return {name: tensor.numpy() for name, tensor in found.items()}

    def in_onnxruntime(self, images: NDArray[np.uint8], sizes: NDArray[np.float32]) -> Outputs:
        names = [output.name for output in self.session.get_outputs()]
        values = self.session.run(names, {"images": images, "image_sizes": sizes})
        return dict(zip(names, values, strict=True))


@pytest.fixture(scope="module")
def export(
    small_model: Callable[..., FasterRCNN],
    model_without_ties: FasterRCNN,
    onnx_of: Callable[[FasterRCNN, Contract], onnx.ModelProto],
) -> Callable[[str, str], Exported]:
    """``export(name, task)`` of the model with that neck, or the one without ties, each done once."""
    done: dict[tuple[str, str], Exported] = {}

    def get(name: str, task: str) -> Exported:
        if (name, task) not in done:
            apart = name == "without ties"
            model = model_without_ties if apart else small_model(name, len(NAMES))
            names = CLASS_NAMES if apart else NAMES
            contract = dataclasses.replace(
                contract_of(model.settings, names, source={"data": "none"}), task=task
            )
            proto = onnx_of(model, contract)
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            session = onnxruntime.InferenceSession(
                proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            done[name, task] = Exported(task, model, contract, proto, session)
        return done[name, task]

    return get


def scenes(
    canvas: tuple[int, int], count: int, sizes: list[tuple[int, int]] | None = None
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Canvases of random patches of 8 pixels, and their sizes (full canvas unless given)."""
    random = np.random.default_rng(count)
    patches = random.integers(0, 256, (count, canvas[0] // 8, canvas[1] // 8, 3), dtype=np.uint8)
    images = patches.repeat(8, axis=1).repeat(8, axis=2)
    return images, np.array(sizes or [canvas] * count, np.float32)


def rows_of(outputs: Outputs, image: int) -> NDArray[np.float64]:
    """Detections of one image as rows (x1, y1, x2, y2, score, label); unused slots must be zero."""
    count = int(outputs["num_detections" if "num_detections" in outputs else "num_proposals"][image])
    columns = [outputs["boxes"][image], outputs["scores"][image][:, None]]
    if "labels" in outputs:
        columns.append(outputs["labels"][image][:, None])
    table = np.concatenate([column.astype(np.float64) for column in columns], axis=1)
    assert not table[count:].any()
    assert (np.diff(table[:count, 4]) <= 0).all(), "not in falling order of score"
    return table[:count]


@pytest.mark.parametrize(("neck", "task"), CASES)
@pytest.mark.parametrize(
    ("batch", "canvas"), [(1, (128, 160)), (3, (160, 96)), (2, (64, 352)), (2, (32, 64)), (8, (128, 160))]
)
def test_onnxruntime_finds_what_pytorch_finds(
    export: Callable[[str, str], Exported],
    check_same_rows: Callable[..., None],
    neck: str,
    task: str,
    batch: int,
    canvas: tuple[int, int],
) -> None:
    exported = export(neck, task)
    images, sizes = scenes(canvas, batch)
    found, expected = exported.in_onnxruntime(images, sizes), exported.in_pytorch(images, sizes)
    assert {name: (v.shape, v.dtype) for name, v in found.items()} == {
        name: (v.shape, v.dtype) for name, v in expected.items()
    }
    for image in range(batch):
        rows = rows_of(expected, image)
        assert len(rows) > (20 if min(canvas) > 32 else 5), "too few to compare anything"
        check_same_rows(rows_of(found, image), rows)


@pytest.mark.parametrize(("neck", "task"), CASES)
def test_an_image_alone_equals_the_same_in_a_mixed_batch(
    export: Callable[[str, str], Exported], check_same_rows: Callable[..., None], neck: str, task: str
) -> None:
    exported = export(neck, task)
    h, w = exported.model.settings.canvas
    mixed = [
        (h, w),
        (h, w // 4),
        (h // 6, w),
        (h - 27, w - 35),
        (1, 1),
        (h, w - 1),
        (h // 2, h // 2),
        (33, w),
    ]
    images, sizes = scenes((h, w), 8, mixed)
    together, expected = exported.in_onnxruntime(images, sizes), exported.in_pytorch(images, sizes)
    for image, (height, width) in enumerate(mixed):
        rows = rows_of(together, image)
        check_same_rows(rows, rows_of(expected, image))
        one = slice(image, image + 1)
        check_same_rows(rows_of(exported.in_onnxruntime(images[one], sizes[one]), 0), rows)
        assert (rows[:, :4] >= 0).all()
        assert (rows[:, [0, 2]] <= width).all()
        assert (rows[:, [1, 3]] <= height).all()


@pytest.mark.parametrize(("neck", "task"), CASES)
def test_empty_images_agree(export: Callable[[str, str], Exported], neck: str, task: str) -> None:
    """Black, white, and of no size at all; a score at the threshold itself is left to rounding."""
    exported = export(neck, task)
    canvas = exported.model.settings.canvas
    images = np.zeros((3, *canvas, 3), np.uint8)
    images[1] = 255
    sizes = np.array([canvas, canvas, (0, 0)], np.float32)
    found, expected = exported.in_onnxruntime(images, sizes), exported.in_pytorch(images, sizes)
    settings = exported.model.settings
    threshold = settings.score_threshold if task == "detections" else settings.rpn_score_threshold
    for image in range(3):
        ours, theirs = rows_of(found, image), rows_of(expected, image)
        assert (ours[:, 4] > threshold + 1e-4).sum() <= len(theirs)
        assert (theirs[:, 4] > threshold + 1e-4).sum() <= len(ours)
    assert len(rows_of(found, 2)) == 0


@pytest.mark.parametrize(
    ("neck", "task", "nodes"),
    [
        ("fpn", "detections", {"BatchedNMS": 2, "RoIAlign": 1}),
        ("without ties", "detections", {"BatchedNMS": 2, BANDS_OP: 1}),  # whose map is small
        ("single", "proposals", {"BatchedNMS": 1}),
    ],
)
def test_custom_ops_are_nodes_of_our_domain_with_a_body(
    export: Callable[[str, str], Exported], neck: str, task: str, nodes: dict[str, int]
) -> None:
    proto = export(neck, task).proto
    domains = {node.domain for node in proto.graph.node}
    assert domains <= {"", "anchorline"}
    custom = [node for node in proto.graph.node if node.domain == "anchorline"]
    assert {op: sum(node.op_type == op for node in custom) for op in nodes} == nodes
    assert len(custom) == sum(nodes.values())
    both = {BANDS_OP, "RoIAlign"} if BANDS_OP in nodes else set()
    assert {function.name for function in proto.functions} == {*nodes, *both}
    for node in custom:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert attributes["plugin_namespace"] == b"anchorline"
        assert attributes["plugin_version"] == b"1"
        (declared,) = [function.attribute for function in proto.functions if function.name == node.op_type]
        assert set(attributes) == set(declared)


def test_the_thresholds_stand_on_the_nodes(export: Callable[[str, str], Exported]) -> None:
    exported = export("fpn", "detections")
    found = []
    for node in exported.proto.graph.node:
        if node.op_type == "BatchedNMS":
            values = {a.name: a.f for a in node.attribute}
            found.append((values["iou_threshold"], values["score_threshold"]))
    settings = exported.model.settings
    assert found[0][0] == pytest.approx(settings.rpn_nms_iou)
    assert found[1] == (pytest.approx(settings.nms_iou), pytest.approx(settings.score_threshold))


@pytest.mark.parametrize(("neck", "task"), CASES)
def test_inputs_and_outputs_are_the_contracts(
    export: Callable[[str, str], Exported], neck: str, task: str
) -> None:
    exported = export(neck, task)
    metadata = {entry.key: entry.value for entry in exported.proto.metadata_props}
    assert set(metadata) == {CONTRACT_KEY}
    contract = Contract.from_json(metadata[CONTRACT_KEY])
    assert (contract.task, contract.names, contract.canvas) == (task, exported.contract.names, None)
    assert dataclasses.replace(contract, outputs=exported.contract.outputs) == exported.contract
    shapes = {value.name: (value.type, value.shape) for value in exported.session.get_inputs()}
    assert shapes == {
        "images": ("tensor(uint8)", ["batch", "height", "width", 3]),
        "image_sizes": ("tensor(float)", ["batch", 2]),
    }
    outputs = exported.session.get_outputs()
    assert tuple(output.name for output in outputs) == contract.outputs
    assert {output.shape[0] for output in outputs} == {"batch"}
    assert all(isinstance(size, int) for output in outputs for size in output.shape[1:])


@pytest.mark.parametrize(("neck", "task"), CASES)
def test_the_file_is_sound_and_tells_nothing_of_the_machine(
    export: Callable[[str, str], Exported], neck: str, task: str
) -> None:
    proto = export(neck, task).proto
    onnx.checker.check_model(proto, full_check=True)
    assert {o.domain: o.version for o in proto.opset_import} == {"": 18, "anchorline": 1}
    assert proto.producer_name == "anchorline"
    bare = onnx.ModelProto()
    bare.CopyFrom(proto)
    for tensor in bare.graph.initializer:
        tensor.ClearField("raw_data")  # among millions of random bytes any three letters turn up
    content = bare.SerializeToString()
    here = str(Path(__file__).resolve().parents[2])
    for trace in (here, str(Path.home()), "site-packages", "dist-packages", ".py", "stack_trace", "torch.nn"):
        assert trace.encode() not in content, trace
