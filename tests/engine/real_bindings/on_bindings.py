"""Run by test_real_bindings.py in a process of its own: our code on NVIDIA's real Python bindings.

TensorRT's libraries are stub_tensorrt.cpp, libcuda is a stub that knows none of our kernels. Each function
without arguments is a test; the arguments are the name of the one to run, the stub's path and that of our
plugin library in C++.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx.parser
import pytest
import tensorrt as trt

from anchorline.engine import toolkit as flavours
from anchorline.engine.options import BuildOptions
from anchorline.engine.toolkit import layer_report, load_toolkit, parse, serialise
from anchorline.runtime.contract import Contract
from anchorline.runtime.io.errors import AnchorlineError, ArtefactError, GpuError
from anchorline.runtime.tensorrt.engine import TensorRTEngine
from anchorline.runtime.tensorrt.library import errors, load_tensorrt
from anchorline.runtime.tensorrt.manifest import EngineManifest
from anchorline.runtime.tensorrt.plugins import BatchedNMS, RoIPool, _creator_class, register_plugins

stub = ctypes.CDLL(sys.argv[2])
BUILD, RUNTIME = 0, 1
FLOAT32, INT32 = (int(getattr(trt.PluginFieldType, name)) for name in ("FLOAT32", "INT32"))


class Field(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int32),
        ("length", ctypes.c_int32),
    )


class Fields(ctypes.Structure):
    _fields_ = (("count", ctypes.c_int32), ("fields", ctypes.POINTER(Field)))


class Context(ctypes.Structure):
    _fields_ = (
        ("device_memory", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("device_memory_size", "batch", "addresses", "runs")),
    )


stub.stub_add_creator.argtypes = [ctypes.c_void_p]
for name in ("stub_plugin", "stub_attach"):
    getattr(stub, name).restype = ctypes.c_void_p
stub.stub_plugin.argtypes = [ctypes.c_int, ctypes.POINTER(Fields), ctypes.c_int32]
stub.stub_attach.argtypes = stub.stub_fields.argtypes = [ctypes.c_void_p]
stub.stub_fields.restype = ctypes.POINTER(Fields)
stub.stub_enqueue.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
stub.stub_context.restype = ctypes.POINTER(Context)
stub.stub_profile.restype = ctypes.POINTER(ctypes.c_int32)
stub.stub_config.restype = ctypes.c_uint64


def plugin_of(creator: int, phase: int, **attributes: float | int) -> int:
    """What TensorRT gets from one of our creators for a node, or an engine's layer, with these attributes."""
    made = []
    for name, value in attributes.items():
        kind = ctypes.c_float if isinstance(value, float) else ctypes.c_int32
        number, code = kind(value), FLOAT32 if isinstance(value, float) else INT32
        made.append((number, Field(name.encode(), ctypes.addressof(number), code, 1)))
    fields = (Field * len(made))(*(field for _, field in made))
    return stub.stub_plugin(creator, ctypes.byref(Fields(len(made), fields)), phase)


def nms(phase: int) -> int:
    plugin = plugin_of(0, phase, iou_threshold=0.7, score_threshold=0.05)
    assert plugin, "no plugin was made"
    return plugin


def the_registry_takes_our_creators() -> None:
    register_plugins(trt)
    register_plugins(trt)
    assert stub.stub_creators() == 2
    assert nms(BUILD)
    assert plugin_of(1, RUNTIME, output_size=7, spatial_scale=0.0625)
    assert plugin_of(0, BUILD, iou_threshold=1.5, score_threshold=0.05) is None  # out of range
    assert plugin_of(0, BUILD, iou_threshold=0.5) is None  # an attribute is missing


def what_a_plugin_serialises_outlives_other_allocations() -> None:
    register_plugins(trt)
    told = stub.stub_fields(nms(BUILD)).contents
    gc.collect()
    others = [np.full(1, 9.5, np.float32) for _ in range(10_000)]
    read = {
        field.name: ctypes.cast(field.data, ctypes.POINTER(ctypes.c_float))[0]
        for field in told.fields[: told.count]
    }
    assert read == {b"iou_threshold": np.float32(0.7), b"score_threshold": np.float32(0.05)}, read
    assert len(others) == 10_000


def a_plugin_that_fails_is_a_failure() -> None:
    register_plugins(trt)
    mark = errors.mark()
    assert stub.stub_enqueue(nms(RUNTIME), 0, 300) == 0  # no group: nothing to launch
    assert stub.stub_enqueue(nms(RUNTIME), 4, 300) != 0
    assert errors.reason(mark).startswith("running BatchedNMS failed: CUDA"), errors.reason(mark)
    assert stub.stub_enqueue(nms(RUNTIME), 4, 100_000) != 0  # more than the kernel takes


def kernels_that_cannot_be_loaded_refuse_the_context() -> None:
    register_plugins(trt)
    mark = errors.mark()
    assert stub.stub_attach(nms(BUILD))  # a builder needs no kernels
    assert stub.stub_attach(nms(RUNTIME)) is None
    assert errors.reason(mark).startswith("loading the kernels of BatchedNMS failed: CUDA")


def the_library_in_cpp_is_loaded_by_the_registry() -> None:
    """NVIDIA's code, compiled with NVIDIA's headers, calls the objects of our library."""
    registry = trt.get_plugin_registry()
    registry.load_library(sys.argv[3])
    creator = registry.get_creator("RoIPool", "1", "anchorline")
    assert isinstance(creator, trt.IPluginCreatorV3One)
    assert (creator.name, creator.plugin_version, creator.plugin_namespace) == ("RoIPool", "1", "anchorline")
    kinds = {"output_size": trt.PluginFieldType.INT32, "spatial_scale": trt.PluginFieldType.FLOAT32}
    assert {field.name: field.type for field in creator.field_names} == kinds
    values = {"output_size": np.array([14], np.int32), "spatial_scale": np.array([0.125], np.float32)}
    fields = trt.PluginFieldCollection([trt.PluginField(n, v, kinds[n]) for n, v in values.items()])
    plugin = creator.create_plugin("node", fields, trt.TensorRTPhase.RUNTIME)
    core = plugin.get_capability_interface(trt.PluginCapabilityType.CORE)
    assert (core.plugin_name, core.plugin_version, core.plugin_namespace) == ("RoIPool", "1", "anchorline")
    assert plugin.get_capability_interface(trt.PluginCapabilityType.BUILD).num_outputs == 1
    with pytest.raises(AnchorlineError, match="another plugin anchorline::BatchedNMS version 1"):
        register_plugins(trt)


def add_of_library(place: int) -> int:
    """Registers one of our library's creators, of BatchedNMS and RoIPool; returns its place."""
    creators = ctypes.CDLL(sys.argv[3]).getCreators
    creators.restype = ctypes.POINTER(ctypes.c_void_p)
    return int(stub.stub_add_creator(creators(ctypes.byref(ctypes.c_int32()))[place]))


def fields_of_other_types_and_lengths_make_no_plugin() -> None:
    """As a damaged engine may hold them."""
    of_library, of_python = add_of_library(1), stub.stub_creators()
    trt.get_plugin_registry().register_creator(_creator_class(trt)(RoIPool), "another")
    for creator in (of_library, of_python):
        for kind, length, made in (
            (INT32, 1, True), (INT32, 2, False), (INT32, -1, False), (INT32, 0, False), (99, 1, False),
        ):  # fmt: skip
            size, scale = (ctypes.c_int32 * 2)(7, 7), ctypes.c_float(0.0625)
            fields = (Field * 2)(
                Field(b"output_size", ctypes.addressof(size), kind, length),
                Field(b"spatial_scale", ctypes.addressof(scale), FLOAT32, 1),
            )
            plugin = stub.stub_plugin(creator, ctypes.byref(Fields(2, fields)), RUNTIME)
            assert (plugin is not None) == made, (creator, kind, length)


def creators_live_on_with_the_registry() -> None:
    """Also where the second is refused: nobody else holds the first."""
    add_of_library(1)
    with pytest.raises(AnchorlineError, match="another plugin anchorline::RoIPool version 1"):
        register_plugins(trt)
    gc.collect()
    creator = trt.get_plugin_registry().get_creator("BatchedNMS", "1", "anchorline")
    assert creator.op is BatchedNMS
    assert plugin_of(1, BUILD, iou_threshold=0.7, score_threshold=0.05)


def what_python_s_plugin_serialises_makes_one_of_the_library_and_back() -> None:
    register_plugins(trt)
    python = stub.stub_fields(nms(BUILD))
    kept = {field.name: (field.type, field.length) for field in python.contents.fields[:2]}
    of_library = add_of_library(0)
    loaded = stub.stub_plugin(of_library, python, RUNTIME)
    assert loaded, "the library makes no plugin of it"
    again = stub.stub_fields(loaded)
    assert {field.name: (field.type, field.length) for field in again.contents.fields[:2]} == kept
    assert stub.stub_plugin(0, again, RUNTIME), "Python makes no plugin of it"
    assert stub.stub_attach(loaded) is None  # the stub's driver knows none of our kernels
    assert stub.stub_enqueue(loaded, 4, 300) != 0
    assert stub.stub_enqueue(loaded, 0, 300) == 0


def toolkit_for(**options: Any) -> tuple[flavours.Toolkit, BuildOptions]:
    flavours.current_gpu = lambda: ("NVIDIA L4", 89)
    asked = BuildOptions(**options)
    return load_toolkit(asked), asked


MODEL = onnx.parser.parse_model(
    '<ir_version: 10, opset_import: ["": 18]> g (float[1] x) => (float[1] y) { y = Neg (x) }'
)


def roi_align_parses_as_tensorrt_s_plugins_are_registered() -> None:
    toolkit, _ = toolkit_for()
    network, libraries = parse(toolkit, toolkit.create_builder(), MODEL, (1, 4, 8))
    assert libraries == ("nvinfer_vc_plugin",)
    assert layer_report(network) == [
        {"name": "nms", "type": "PLUGIN_V3", "precision": "fp32", "shape": [-1, 2]}
    ]
    parse(toolkit, toolkit.create_builder(), MODEL, (4, 4, 4))  # sets the inputs' shapes
    load_toolkit(BuildOptions())
    assert stub.stub_initialised() == 1


def a_parser_that_refuses_says_why() -> None:
    toolkit = flavours.Toolkit("tensorrt", load_tensorrt("tensorrt"), (89,), "NVIDIA L4")
    with pytest.raises(ArtefactError, match=r"node nvinfer_vc_plugin \(RoiAlign\): Plugin not found"):
        parse(toolkit, toolkit.create_builder(), MODEL, (1, 4, 8))  # nothing is registered


def every_option_reaches_the_builder() -> None:
    toolkit, options = toolkit_for(
        workspace=512, optimization_level=4, hardware_compatible=True, version_compatible=True
    )
    builder = toolkit.create_builder()
    network, libraries = parse(toolkit, builder, MODEL, (1, 4, 8))
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / f"tensorrt-{trt.__version__}-NVIDIA-L4.cache"
        cache.write_bytes(b"of another version")
        steps: list[tuple[int, int]] = []
        plan = serialise(
            toolkit,
            builder,
            network,
            options,
            (1, 4, 8),
            Path(folder),
            lambda done, total: steps.append((done, total)),
            libraries,
        )
        assert cache.read_bytes() == plan.content == b"a plan of the stub"
    assert steps == [(500, 1000), (1000, 1000)]
    assert stub.stub_profile()[:6] == [1, 4, 8] * 2
    assert stub.stub_config(0) == 1 << int(trt.BuilderFlag.VERSION_COMPATIBLE)
    assert (stub.stub_config(1), stub.stub_config(2)) == (4, 512 << 20)


def a_version_compatible_engine_without_its_libraries_is_refused() -> None:
    toolkit, options = toolkit_for(version_compatible=True)
    builder = toolkit.create_builder()
    network, _ = parse(toolkit, builder, MODEL, (1, 4, 8))
    with pytest.raises(AnchorlineError, match="nvinfer_vc_plugin is used and not among those to serialize"):
        serialise(toolkit, builder, network, options, (1, 4, 8))


def engine_of(folder: str, plan: bytes, **options: Any) -> TensorRTEngine:
    path = Path(folder) / "model.engine"
    path.write_bytes(plan)
    contract = Contract("detections", ("a",), (48, 64), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), max_batch=8)
    manifest = EngineManifest(
        path, contract, "tensorrt", trt.__version__, (89,), "fp16", (1, 4, 8), "0" * 64, "0", options, {}
    )
    cuda: Any = SimpleNamespace(
        compute_capability=89,
        device_name="NVIDIA L4",
        synchronize=lambda stream: None,
        memory_info=lambda: (1, 2),
    )
    return TensorRTEngine(path, manifest, load_tensorrt("tensorrt"), cuda)


def an_engine_is_opened_bound_and_run() -> None:
    with tempfile.TemporaryDirectory() as folder:
        engine = engine_of(folder, b"a plan of the stub", version_compatible=True)
    assert stub.stub_initialised() == 1
    assert stub.stub_host_code()
    assert [(t.name, str(t.dtype), t.shape) for t in engine.inputs] == [
        ("images", "uint8", (48, 64, 3)),
        ("image_sizes", "float32", (2,)),
    ]
    assert [(t.name, str(t.dtype), t.shape) for t in engine.outputs] == [
        ("boxes", "float32", (3, 4)),
        ("scores", "float32", (3,)),
        ("labels", "int32", (3,)),
        ("num_detections", "int32", ()),
    ]
    assert engine.activation_bytes == 4096
    addresses = {
        tensor.name: 256 * place for place, tensor in enumerate((*engine.inputs, *engine.outputs), 1)
    }
    slot = engine.create_slot(4, addresses, 1 << 20)
    engine.execute(slot, 7)
    context = stub.stub_context().contents
    assert (context.device_memory, context.device_memory_size) == (1 << 20, 4096)
    assert (context.batch, context.addresses, context.runs) == (4, 6, 1)
    with pytest.raises(GpuError, match="enqueueV3: no stream"):
        engine.execute(slot, 0)
    with pytest.raises(GpuError, match="setInputShape: not in the profile"):
        engine.create_slot(9, addresses, 1 << 20)
    slot.context = None
    engine.close()


def a_damaged_plan_is_refused_with_the_reason() -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        pytest.raises(ArtefactError, match=r"TensorRT 11\S+ cannot load it \(magicTag failed\)"),
    ):
        engine_of(folder, b"another plan")


if __name__ == "__main__":
    logging.getLogger("anchorline.tensorrt").addHandler(logging.StreamHandler())
    test: Callable[[], None] = globals()[sys.argv[1]]
    test()
    print("passed")
