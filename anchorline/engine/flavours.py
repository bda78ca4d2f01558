"""What differs between TensorRT (10.12 and later, 11) and TensorRT for RTX when an engine is built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from anchorline.engine.options import BuildOptions
from anchorline.runtime.errors import AnchorlineError, SettingsError
from anchorline.runtime.plugins import register_plugins
from anchorline.runtime.tensorrt_library import FLAVOURS, captured_log, load_tensorrt, tensorrt_logger

_NOT_A_CAPABILITY = ("NONE", "CURRENT")
# Alone by NVIDIA's advice (TensorRT for RTX, support matrix): in an engine with others it costs speed, and
# several times the activation memory.
_TURING = 75
_MIB = 1 << 20


@dataclass(frozen=True)
class Toolkit:
    """A loaded flavour: ``trt`` is its Python module, ``capabilities`` what the engine will be built for.

    ``gpu`` names the GPU an engine is timed on; TensorRT for RTX builds without one.
    """

    name: str
    trt: Any
    capabilities: tuple[int, ...]
    gpu: str | None

    @property
    def title(self) -> str:
        return FLAVOURS[self.name].title

    @property
    def version(self) -> str:
        return str(self.trt.__version__)

    def create_builder(self) -> Any:
        """A builder, or ``AnchorlineError`` with TensorRT's own reason."""
        with captured_log() as records:
            try:
                builder = self.trt.Builder(tensorrt_logger(self.name))
            except TypeError:  # how the bindings say that there is none
                builder = None
        if builder is None:
            reason = records[-1].getMessage() if records else "no reason given"
            raise AnchorlineError(
                f"{self.title} {self.version} could not start ({reason}); see anchorline doctor"
            )
        return builder

    def create_network(self, builder: Any) -> Any:
        """An empty, strongly typed network: types are those of the graph, in each version of TensorRT."""
        return builder.create_network(1 << int(self.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))

    def create_config(self, builder: Any, options: BuildOptions) -> Any:
        """The builder's settings, without profiles, progress and timing cache."""
        config = builder.create_builder_config()
        if options.workspace is not None:
            config.set_memory_pool_limit(self.trt.MemoryPoolType.WORKSPACE, options.workspace * _MIB)
        if options.optimization_level is not None:
            config.builder_optimization_level = options.optimization_level
        if options.version_compatible:
            config.set_flag(self.trt.BuilderFlag.VERSION_COMPATIBLE)
        if options.hardware_compatible:
            config.hardware_compatibility_level = self.trt.HardwareCompatibilityLevel.AMPERE_PLUS
        if self.name == "tensorrt-rtx":
            config.num_compute_capabilities = len(self.capabilities)
            for index, number in enumerate(self.capabilities):
                config.set_compute_capability(getattr(self.trt.ComputeCapability, f"SM{number}"), index)
        return config


def load_toolkit(options: BuildOptions) -> Toolkit:
    """Load the flavour that ``options`` ask for, with our plugins registered.

    Raises ``SettingsError`` when it is not installed, when a compute capability is not known to it, or
    when it needs a GPU and there is none.
    """
    trt = load_tensorrt(options.target)
    register_plugins(trt)
    if options.target == "tensorrt-rtx":
        return Toolkit(options.target, trt, _rtx_capabilities(trt, options.compute_capabilities), None)
    name, capability = current_gpu()
    return Toolkit(options.target, trt, (capability,), name)


def current_gpu() -> tuple[str, int]:
    """Name and compute capability (86 for 8.6) of the first GPU; raises ``SettingsError`` without one."""
    try:
        from anchorline.runtime.plugins.driver import first_gpu

        return first_gpu()
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"{error.name} is not installed, and TensorRT's builder needs it: pip install 'anchorline[gpu]'"
        ) from None
    except Exception as error:  # cuda-bindings raise errors of their own where there is no driver
        reason = str(error).partition(";")[0]
        raise SettingsError(
            f"TensorRT needs an NVIDIA GPU to build, and none can be used here ({reason}); build on the "
            "machine that will run the engine, or with --target tensorrt-rtx"
        ) from None


def _rtx_capabilities(trt: Any, asked: tuple[int, ...]) -> tuple[int, ...]:
    members = trt.ComputeCapability.__members__
    known = sorted(int(name.removeprefix("SM")) for name in members if name not in _NOT_A_CAPABILITY)
    for number in asked:
        if number not in known:
            raise SettingsError(
                f"compute capability is {number}; TensorRT for RTX {trt.__version__} builds for "
                f"{', '.join(map(str, known))}"
            )
    return tuple(sorted(set(asked))) or tuple(number for number in known if number != _TURING)
