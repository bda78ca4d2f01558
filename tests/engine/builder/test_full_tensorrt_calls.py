"""The calls the builder makes to full TensorRT, over a double: this path has not run on TensorRT itself."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from anchorline.engine import build as builder
from anchorline.engine import toolkit as flavours
from anchorline.engine.build import build_engine, build_identity
from anchorline.engine.lowering import lower
from anchorline.engine.options import BuildOptions
from anchorline.runtime.io.errors import SettingsError
from anchorline.runtime.tensorrt import library as tensorrt_library
from anchorline.runtime.tensorrt import plugins

# Beside this file; test folders are no packages.
_spec = importlib.util.spec_from_file_location(
    "tensorrt_double", Path(__file__).with_name("tensorrt_double.py")
)
assert _spec is not None
assert _spec.loader is not None
double = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(double)

ModelFile = Callable[[str], Path]
VERSIONS = ("10.16.0.72", "11.4.1.5")
CANVASES = [((128, 160),) * 3]


@pytest.fixture(params=VERSIONS)
def tensorrt(request: pytest.FixtureRequest, rtx: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The double as the module ``tensorrt``, with a GPU that is told."""
    module = double.TensorRTDouble(rtx, request.param)
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", module)
    monkeypatch.setattr(flavours, "current_gpu", lambda: ("NVIDIA L4", 89))
    # RoiAlign cannot be parsed without a driver; the calls do not depend on the graph.
    monkeypatch.setattr(
        builder, "lower", lambda model, _, *rest, **kw: lower(model, "tensorrt-rtx", *rest, **kw)
    )
    # One library serves both modules here: the plugins are registered, and one logger is in use.
    flavours.register_plugins(rtx)
    monkeypatch.setattr(plugins, "_registered", {rtx.__name__, "tensorrt"})
    logger = tensorrt_library.tensorrt_logger("tensorrt-rtx")
    monkeypatch.setattr(flavours, "tensorrt_logger", lambda _: logger)
    monkeypatch.setattr("anchorline.engine.toolkit.tensorrt_logger", lambda _: logger)
    tensorrt_library.load_tensorrt.cache_clear()
    yield module
    tensorrt_library.load_tensorrt.cache_clear()


def test_a_build_uses_only_what_every_version_has(
    tensorrt: Any, model_file: ModelFile, tmp_path: Path
) -> None:
    cache = tmp_path / "cache" / f"tensorrt-{tensorrt.__version__}-NVIDIA-L4.cache"
    cache.parent.mkdir()
    cache.write_bytes(b"of an earlier build")
    result = build_engine(
        model_file("proposals"),
        tmp_path / "m.engine",
        BuildOptions(precision="fp32", batch=(1, 2, 4), workspace=512, optimization_level=2),
        timing_cache=tmp_path / "cache",
        progress=lambda done, total: None,
    )
    assert result.built
    assert result.manifest.flavour == "tensorrt"
    assert result.manifest.compute_capabilities == (89,)
    assert result.manifest.raw["gpu"] == "NVIDIA L4"
    assert list(cache.parent.iterdir()) == [cache]
    assert cache.read_bytes() != b"of an earlier build"
    assert {
        "Builder.build_serialized_network",
        "Builder.create_network",
        "IBuilderConfig.add_optimization_profile",
        "IBuilderConfig.builder_optimization_level",
        "IBuilderConfig.create_timing_cache",
        "IBuilderConfig.progress_monitor",
        "IBuilderConfig.set_memory_pool_limit",
        "IBuilderConfig.set_timing_cache",
        "OnnxParser.parse",
    } <= tensorrt.calls


def test_compatibility_options_are_set(tensorrt: Any) -> None:
    options = BuildOptions(version_compatible=True, hardware_compatible=True)
    toolkit = flavours.load_toolkit(options)
    config = toolkit.create_config(toolkit.create_builder(), options)
    assert not hasattr(config, "num_compute_capabilities")
    assert {
        "BuilderFlag.VERSION_COMPATIBLE",
        "HardwareCompatibilityLevel",
        "IBuilderConfig.hardware_compatibility_level",
        "IBuilderConfig.set_flag",
    } <= tensorrt.calls


def test_a_version_compatible_engine_has_no_plugin_of_ours(
    tensorrt: Any, model_file: ModelFile, tmp_path: Path
) -> None:
    """It brings the libraries of TensorRT's own plugins along, and none can be made of Python."""
    out, source = tmp_path / "m.engine", model_file("proposals")
    with pytest.raises(SettingsError, match=r"BatchedNMS .* build with --nms fixed-point"):
        build_engine(source, out, BuildOptions(version_compatible=True))
    assert not out.exists()
    options = BuildOptions(nms="fixed-point", version_compatible=True)
    assert build_engine(source, out, options, verify=False).manifest.raw["plugins"] == {}
    assert {
        "OnnxParser.get_used_vc_plugin_libraries",
        "IBuilderConfig.plugins_to_serialize",
    } <= tensorrt.calls


def test_another_gpu_or_version_is_another_build(tensorrt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def key() -> str:
        options = BuildOptions()
        identity = build_identity("0" * 64, options, (1, 1, 1), CANVASES, flavours.load_toolkit(options), ())
        return json.dumps(identity)

    first = key()
    assert key() == first
    monkeypatch.setattr(flavours, "current_gpu", lambda: ("NVIDIA A10", 86))
    second = key()
    tensorrt.__version__ = "11.5.0.1"
    assert len({first, second, key()}) == 3


def test_the_double_refuses_what_some_version_lacks(tensorrt: Any) -> None:
    toolkit = flavours.load_toolkit(BuildOptions())
    made = toolkit.create_builder()
    config = made.create_builder_config()
    with pytest.raises(AttributeError, match="ComputeCapability"):
        _ = tensorrt.ComputeCapability
    with pytest.raises(AttributeError, match="num_compute_capabilities"):
        config.num_compute_capabilities = 2
    with pytest.raises(AttributeError, match="FP16"):
        _ = tensorrt.BuilderFlag.FP16
    with pytest.raises(AttributeError, match="build_engine"):
        made.build_engine()
    with pytest.raises(AttributeError, match="max_workspace_size"):
        config.max_workspace_size = 1
    with pytest.raises(SettingsError, match="the GPU at hand"):
        BuildOptions(compute_capabilities=(86,))
