"""A double of the module ``tensorrt``: which calls the builder may make, checked against what is known.

Full TensorRT cannot be installed where this project is developed. Its Python API is that of TensorRT for
RTX under another name, so the names are read from the installed RTX bindings, less what full TensorRT does
not have in each of the versions 10.12 to 11.4. An attribute that is not left over raises, to read, to call
or to set. What is allowed goes on to TensorRT for RTX, so that an engine really is built.
"""

from __future__ import annotations

from typing import Any

# TensorRT for RTX alone has these: https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/
# inference-library/cpu-engines.html; they are missing in TensorRT's own class index,
# https://docs.nvidia.com/deeplearning/tensorrt/11.4.1/_static/c-api/classnvinfer1_1_1_i_builder_config-members.html
RTX_ONLY = {
    "IBuilderConfig": {"num_compute_capabilities", "get_compute_capability", "set_compute_capability"},
    "module": {"ComputeCapability", "CudaGraphStrategy", "IRuntimeCache"},
}
# In the 11.4 index and not in that of 10.14, .../latest/_static/c-api/ (as archived for 10.14.1).
NEW_IN_11 = {"IBuilderConfig": {"all_build_routes", "build_route", "max_num_tactics"}}
# Removed in 11: https://docs.nvidia.com/deeplearning/tensorrt/11.4.0/api/migration/
# tensorrt-10x-to-11x-python-api-reference.html
REMOVED_IN_11 = {
    "BuilderFlag": {"FP16", "INT8", "BF16", "FP8", "INT4", "FP4", "DIRECT_IO", "OBEY_PRECISION_CONSTRAINTS"},
    "IBuilderConfig": {"int8_calibrator", "set_calibration_profile", "quantization_flags"},
    "ICudaEngine": {"device_memory_size"},
}
# Classes that are handed out as they are: bases to derive from, plain values, and enumerations.
_PLAIN = {
    "ILogger",
    "IProgressMonitor",
    "IPluginV3",
    "IPluginV3OneCore",
    "IPluginV3OneBuild",
    "IPluginV3OneRuntime",
    "IPluginCreatorV3One",
    "PluginField",
    "PluginFieldCollection",
    "PluginFieldType",
    "DimsExprs",
    "DimensionOperation",
    "TensorFormat",
    "TensorRTPhase",
    "NetworkDefinitionCreationFlag",
    "MemoryPoolType",
    "HardwareCompatibilityLevel",
    "float32",
    "float16",
}


class TensorRTDouble:
    """Stands for the module. ``calls`` collects what was used, as ``IBuilderConfig.set_flag``."""

    __name__ = "tensorrt"

    def __init__(self, rtx: Any, version: str) -> None:
        self._rtx, self.__version__, self.calls = rtx, version, set()

    def __getattr__(self, name: str) -> Any:
        if name in RTX_ONLY["module"] or not hasattr(self._rtx, name):
            raise AttributeError(f"tensorrt has no {name}")
        self.calls.add(name)
        value = getattr(self._rtx, name)
        if name in _PLAIN:
            return value
        if name == "BuilderFlag":
            return _Checked(value, name, self)
        if name == "Builder":
            return lambda logger: _Builder(value(logger), "Builder", self)
        if name == "OnnxParser":
            return lambda network, logger: _Checked(value(network._real, logger), name, self)
        if name == "get_plugin_registry":
            return value
        raise AttributeError(f"the double does not know tensorrt.{name}; check it and add it")


class _Checked:
    """An object of TensorRT for RTX of which only what full TensorRT has can be seen."""

    def __init__(self, real: Any, kind: str, module: TensorRTDouble) -> None:
        object.__setattr__(self, "_real", real)
        object.__setattr__(self, "_kind", kind)
        object.__setattr__(self, "_module", module)

    def __getattr__(self, name: str) -> Any:
        self._check(name)
        value = getattr(self._real, name)
        return self._called(name, value) if callable(value) else value

    def __setattr__(self, name: str, value: Any) -> None:
        self._check(name)
        setattr(self._real, name, value)

    def _check(self, name: str) -> None:
        for table in (RTX_ONLY, NEW_IN_11, REMOVED_IN_11):
            if name in table.get(self._kind, ()):
                raise AttributeError(f"not in every TensorRT from 10.12 to 11: {self._kind}.{name}")
        if not hasattr(type(self._real), name) and not hasattr(self._real, name):
            raise AttributeError(f"TensorRT's {self._kind} has no {name}")
        self._module.calls.add(f"{self._kind}.{name}")

    def _called(self, name: str, method: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            return method(*(getattr(each, "_real", each) for each in arguments), **named)

        return call


class _Builder(_Checked):
    """The builder makes the objects that are checked in turn."""

    def create_network(self, flags: int) -> _Checked:
        self._check("create_network")
        return _Checked(self._real.create_network(flags), "INetworkDefinition", self._module)

    def create_builder_config(self) -> _Checked:
        self._check("create_builder_config")
        config = self._real.create_builder_config()
        # There is no GPU: what full TensorRT takes from it has to be told.
        config.num_compute_capabilities = 1
        config.set_compute_capability(self._module._rtx.ComputeCapability.SM86, 0)
        return _Config(config, "IBuilderConfig", self._module)


class _Config(_Checked):
    """TensorRT for RTX cannot be asked for some options without a GPU: they are kept and not handed on."""

    def set_flag(self, flag: Any) -> None:
        self._check("set_flag")
        if flag != self._module._rtx.BuilderFlag.VERSION_COMPATIBLE:
            self._real.set_flag(flag)
