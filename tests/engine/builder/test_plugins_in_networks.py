"""The plugins inside TensorRT for RTX: parsed, asked for shapes and memory, and built without CUDA."""

from __future__ import annotations

import logging
import subprocess
import sys
from typing import Any

import onnx.parser
import pytest

from anchorline.engine import toolkit as engine
from anchorline.engine.options import Batch, BuildOptions
from anchorline.runtime.io.errors import AnchorlineError
from anchorline.runtime.tensorrt import library as tensorrt_library
from anchorline.runtime.tensorrt import plugins
from anchorline.runtime.tensorrt.cuda import CudaError
from anchorline.runtime.tensorrt.plugins import register_plugins

PLUGIN = 'plugin_namespace = "anchorline", plugin_version = "1"'
NMS = f"""<ir_version: 10, opset_import: ["": 18, "anchorline": 1]>
suppress (float[G, 300, 4] boxes, float[G, 300] scores) => (float[G, 300] kept) {{
    kept = anchorline.BatchedNMS <iou_threshold = 0.5, score_threshold = 0.05, {PLUGIN}> (boxes, scores)
}}"""
POOL = f"""<ir_version: 10, opset_import: ["": 18, "anchorline": 1]>
pool (KIND[B, 8, 20, 30] features, float[B, 50, 4] rois) => (KIND[R, 8, 7, 7] pooled) {{
    pooled = anchorline.RoIPool <output_size = 7, spatial_scale = 0.0625, {PLUGIN}> (features, rois)
}}"""


def network_of(text: str, batch: Batch = (1, 2, 8)) -> tuple[Any, Any, Any, BuildOptions]:
    options = BuildOptions(target="tensorrt-rtx", compute_capabilities=(86,))
    toolkit = engine.load_toolkit(options)
    builder = toolkit.create_builder()
    network, _ = engine.parse(toolkit, builder, onnx.parser.parse_model(text), batch)
    return toolkit, builder, network, options


def plugin_output(network: Any) -> Any:
    (layer,) = [
        network.get_layer(index)
        for index in range(network.num_layers)
        if network.get_layer(index).type.name == "PLUGIN_V3"
    ]
    return layer.get_output(0)


def test_batched_nms_keeps_the_shape_of_the_scores(rtx: Any) -> None:
    toolkit, builder, network, options = network_of(NMS)
    output = plugin_output(network)
    assert (tuple(output.shape), output.dtype) == ((-1, 300), rtx.float32)
    plan = engine.serialise(toolkit, builder, network, options, (1, 2, 8))
    # Five words of 64 boxes: 15 tiles of 512 bytes for each of at most eight groups.
    (memory,) = plan.activation_bytes
    assert memory is not None
    assert 8 * 15 * 512 <= memory < 8 * 15 * 512 + 8192
    assert plan.warnings == ()


@pytest.mark.parametrize(("kind", "name"), [("float", "FLOAT"), ("float16", "HALF")])
def test_roi_pool_takes_either_precision(rtx: Any, kind: str, name: str) -> None:
    toolkit, builder, network, options = network_of(POOL.replace("KIND", kind))
    output = plugin_output(network)
    assert (tuple(output.shape), output.dtype.name) == ((-1, 8, 7, 7), name)
    assert len(engine.serialise(toolkit, builder, network, options, (1, 2, 8)).content) > 1000


def test_attributes_out_of_range_are_refused_with_their_name(
    rtx: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.ERROR, "anchorline.tensorrt"),
        pytest.raises(AnchorlineError, match="the plugin is not registered or refused"),
    ):
        network_of(NMS.replace("iou_threshold = 0.5", "iou_threshold = 1.5"))
    assert "iou_threshold is 1.5" in caplog.text


@pytest.mark.parametrize(
    ("boxes", "batch", "told"), [(8200, (1, 2, 8), "of 8200 boxes"), (4, (1, 2, 70_000), "70000 groups of 4")]
)
def test_more_than_the_kernels_take_is_not_built(rtx: Any, boxes: int, batch: Batch, told: str) -> None:
    """Not at the first frame; ``--batch`` may ask for more groups than a grid has."""
    toolkit, builder, network, options = network_of(NMS.replace("300", str(boxes)), batch)
    with pytest.raises(AnchorlineError, match=rf"{told}.*; the plugin takes at most 65535 of 8192"):
        engine.serialise(toolkit, builder, network, options, batch)


def test_registering_twice_is_harmless(rtx: Any) -> None:
    register_plugins(rtx)
    register_plugins(rtx)
    assert [each.name for each in rtx.get_plugin_registry().all_creators].count("RoIPool") == 1


def test_another_plugin_of_that_name_is_named(rtx: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    register_plugins(rtx)
    monkeypatch.setattr(plugins, "_registered", set())
    with pytest.raises(AnchorlineError, match="another plugin anchorline::BatchedNMS version 1"):
        register_plugins(rtx)


def test_a_plugin_that_fails_to_run_raises_and_is_the_reason_of_tensorrt_s_failure(rtx: Any) -> None:
    """An exception alone is a failure to TensorRT's Python layer, and it says nothing to TensorRT's log."""
    plugin = plugins._plugin_class(rtx)(plugins.BatchedNMS(iou_threshold=0.5, score_threshold=0.0), False)
    mark = tensorrt_library.errors.mark()
    with pytest.raises(AttributeError, match="dims"):
        plugin.enqueue([object()], [], [1], [2], 0, 0)
    assert tensorrt_library.errors.reason(mark).startswith("running BatchedNMS failed: ")


def test_kernels_that_cannot_be_loaded_refuse_the_context(rtx: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: str, kernels: Any) -> None:
        raise CudaError("loading the image of nms", "CUDA_ERROR_NO_BINARY_FOR_GPU")

    monkeypatch.setattr(plugins, "preload", refuse)
    op = plugins.BatchedNMS(iou_threshold=0.5, score_threshold=0.0)
    assert plugins._plugin_class(rtx)(op, False).attach_to_context(None).op is op  # to build loads none
    with pytest.raises(CudaError, match="NO_BINARY_FOR_GPU"):
        plugins._plugin_class(rtx)(op, True).attach_to_context(None)


def test_what_is_serialised_makes_the_same_plugin(rtx: Any) -> None:
    """An engine holds the fields and gives them back when it is loaded."""
    plugin = plugins._plugin_class(rtx)(plugins.RoIPool(output_size=14, spatial_scale=0.125), False)
    creator = plugins._creator_class(rtx)(plugins.RoIPool)
    loaded = creator.create_plugin("node", plugin.get_fields_to_serialize(), rtx.TensorRTPhase.RUNTIME)
    assert loaded.loaded
    assert (loaded.op.output_size, loaded.op.spatial_scale) == (14, 0.125)
    assert vars(loaded.clone().op) == vars(plugin.op)


def test_building_loads_no_cuda(rtx: Any) -> None:
    code = (
        "import sys; sys.modules['cuda'] = None\n"
        "import onnx.parser\n"
        "from anchorline.engine import toolkit as engine\n"
        "from anchorline.engine.options import Batch, BuildOptions\n"
        "options = BuildOptions(target='tensorrt-rtx', compute_capabilities=(86,))\n"
        "toolkit = engine.load_toolkit(options)\n"
        "builder = toolkit.create_builder()\n"
        f"network, _ = engine.parse(toolkit, builder, onnx.parser.parse_model('''{NMS}'''), (1, 2, 8))\n"
        "print(len(engine.serialise(toolkit, builder, network, options, (1, 2, 8)).content))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert int(done.stdout) > 1000, done.stderr


def test_importing_the_plugins_brings_nothing_heavy_along() -> None:
    code = (
        "import sys, anchorline.runtime.tensorrt.plugins, anchorline.runtime.tensorrt.library\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"cuda", "tensorrt", "tensorrt_rtx", "onnx", "torch"}.isdisjoint(done.stdout.split())


def test_the_log_goes_to_python_s_logging(rtx: Any) -> None:
    logger = tensorrt_library.tensorrt_logger("tensorrt-rtx")
    with tensorrt_library.captured_log() as records:
        logger.log(rtx.ILogger.Severity.WARNING, " something odd \n")
        logger.log(rtx.ILogger.Severity.VERBOSE, "chatter")
    assert [(record.name, record.levelname, record.getMessage()) for record in records] == [
        ("anchorline.tensorrt", "WARNING", "something odd")
    ]


def test_the_libraries_are_linked_in_a_cache_and_not_in_the_package(
    rtx: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tensorrt_library._load_rtx_libraries()
    (folder,) = (tmp_path / "cache" / "anchorline").iterdir()
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(f"{n}{e}" for n in tensorrt_library._RTX_LIBRARIES for e in ("", ".1"))
    stale = folder / names[0]
    stale.unlink()
    stale.symlink_to(tmp_path / "gone")
    tensorrt_library._load_rtx_libraries()
    assert stale.exists()
    assert len(list(folder.iterdir())) == 4


def test_a_cache_that_cannot_be_written_is_done_without(
    rtx: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tensorrt_library._load_rtx_libraries()
    (folder,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert (folder / "libtensorrt_rtx.so").exists()
