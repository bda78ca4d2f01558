"""TensorRT (10.12 and later, 11) and TensorRT for RTX as the builder uses them: parser, builder, layers."""

from __future__ import annotations

import concurrent.futures
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from anchorline.engine.options import Batch, BuildOptions
from anchorline.runtime.canvas import CanvasRange
from anchorline.runtime.io.errors import AnchorlineError, ArtefactError, SettingsError, one_line
from anchorline.runtime.io.files import atomic_write_bytes
from anchorline.runtime.tensorrt.library import FLAVOURS, captured_log, load_tensorrt, tensorrt_logger
from anchorline.runtime.tensorrt.plugins import log as plugin_log
from anchorline.runtime.tensorrt.plugins import register_plugins

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
                return self.trt.Builder(tensorrt_logger(self.name))
            except TypeError:  # how the bindings say that there is none
                reason = records[-1].getMessage() if records else "no reason given"
        raise AnchorlineError(
            f"{self.title} {self.version} could not start ({reason}); see anchorline doctor"
        ) from None

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
    if options.target == "tensorrt":
        gpu, capability = current_gpu()
        return Toolkit(options.target, trt, (capability,), gpu)
    known = sorted(int(name[2:]) for name in trt.ComputeCapability.__members__ if name.startswith("SM"))
    for number in options.compute_capabilities:
        if number not in known:
            raise SettingsError(
                f"compute capability is {number}; TensorRT for RTX {trt.__version__} builds for "
                f"{', '.join(map(str, known))}"
            )
    default = (number for number in known if number != _TURING)
    return Toolkit(options.target, trt, tuple(sorted(set(options.compute_capabilities) or default)), None)


def current_gpu() -> tuple[str, int]:
    """Name and compute capability (86 for 8.6) of the first GPU; raises ``SettingsError`` without one."""
    try:
        from anchorline.runtime.tensorrt.cuda import first_gpu

        return first_gpu()
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"{error.name} is not installed, and TensorRT's builder needs it: pip install 'anchorline[gpu]'"
        ) from None
    except Exception as error:  # cuda-bindings raise errors of their own where there is no driver
        reason = str(error).partition(";")[0]
        raise SettingsError(
            f"TensorRT needs an NVIDIA GPU to build, and none can be used here ({reason}); build on the "
            "machine that will run the engine, or with --for tensorrt-rtx"
        ) from None


# Weights and shape arithmetic: hundreds of layers that do no work.
_LEFT_OUT = ("CONSTANT", "SHAPE")
_TYPES = {"FLOAT": "fp32", "HALF": "fp16"}


def layer_report(network: Any) -> list[dict[str, Any]]:
    """For each layer its name, type, precision (of its first output) and that output's shape (-1: free).

    Of the parsed network: TensorRT for RTX compiles all of it into one fused node, so the engine tells less.
    """
    rows = []
    for layer in map(network.get_layer, range(network.num_layers)):
        if layer.type.name in _LEFT_OUT or not layer.num_outputs:
            continue
        output = layer.get_output(0)
        try:
            shape = [int(side) for side in output.shape]
        except ValueError:  # the bindings refuse to list axes of unknown number
            shape = None
        precision = _TYPES.get(output.dtype.name, output.dtype.name.lower())
        rows.append({"name": layer.name, "type": layer.type.name, "precision": precision, "shape": shape})
    return rows


_CAUSES = (
    (r"plugin|Plugin not found|creator", "the plugin is not registered or refused the node's attributes"),
    (r"TopK|topk", "TensorRT's TopK takes at most 3840 values"),
    (r"UINT8|uint8", "TensorRT moves no uint8 about: it must be Cast first"),
    (r"NonZero|NonMaxSuppression", "TensorRT does not run operators whose output size depends on the data"),
    (r"RoiAlign", "TensorRT for RTX cannot parse RoiAlign without a driver"),
    (r"opset|Opset", "this TensorRT does not know the graph's opset"),
)


def parse(
    toolkit: Toolkit, builder: Any, model: onnx.ModelProto, batch: Batch
) -> tuple[Any, tuple[str, ...]]:
    """The network of ``model``, and the libraries of TensorRT's own plugins in it.

    Where the batch does not vary, the inputs have that batch fixed. A version-compatible engine takes the
    libraries along. Raises ``ArtefactError`` naming node and operator, with the known cause if there is one.
    """
    # Strongly typed: types are those of the graph, in each version of TensorRT.
    typed = 1 << int(toolkit.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(typed)
    parser = toolkit.trt.OnnxParser(network, tensorrt_logger(toolkit.name))
    with captured_log() as records:
        parsed = parser.parse(model.SerializeToString())
    if not parsed:
        told = [_describe(parser.get_error(index), model) for index in range(parser.num_errors)]
        reason = (told or [record.getMessage() for record in records] or ["no reason given"])[0]
        raise ArtefactError(f"{toolkit.title} {toolkit.version} cannot parse the graph: {reason}")
    if batch[0] == batch[2]:
        for tensor in map(network.get_input, range(network.num_inputs)):
            tensor.shape = (batch[0], *tuple(tensor.shape)[1:])
    return network, tuple(parser.get_used_vc_plugin_libraries())


def _describe(error: Any, model: onnx.ModelProto) -> str:
    """One parser error: node and operator, what TensorRT says, and the known cause.

    Inside a function the node has no name, but the stack of calls has; elsewhere its number helps.
    """
    text = " ".join(str(error.desc()).split())
    names = [name for name in (error.node_name(), *error.local_function_stack()) if name]
    operator, index, nodes = error.node_operator(), error.node(), model.graph.node
    if 0 <= index < len(nodes):
        names.append(nodes[index].name or ", ".join(nodes[index].output))
        operator = operator or nodes[index].op_type
    node = f"node {names[0]} ({operator or 'unknown operator'})" if names else "the graph"
    cause = next((cause for pattern, cause in _CAUSES if re.search(pattern, f"{text} {node}")), None)
    return f"{node}: {text}" + (f" ({cause})" if cause else "")


Progress = Callable[[int, int], None]
_STEPS = 1000  # of the progress bar
_ACTIVATION = re.compile(r"Total Activation Memory: (\d+) bytes")
_MOST_WARNINGS = 20
_WAKE_S = 0.1


@dataclass(frozen=True)
class Plan:
    """A serialised engine, with what TensorRT said: warnings, and the activation memory that each
    optimisation profile will need."""

    content: bytes
    activation_bytes: tuple[int | None, ...]
    warnings: tuple[str, ...]


def serialise(
    toolkit: Toolkit,
    builder: Any,
    network: Any,
    options: BuildOptions,
    batch: Batch,
    timing_cache: Path | None = None,
    progress: Progress | None = None,
    libraries: Sequence[str] = (),
    canvases: Sequence[CanvasRange] = (),
) -> Plan:
    """Build ``network``. A Ctrl-C ends the build at TensorRT's next step and is raised again.

    Where height and width of the images are free, ``canvases`` bound them, in an optimisation profile each.
    ``timing_cache`` is a folder with one file for each GPU and version, ``libraries`` are ``parse``'s. Raises
    ``AnchorlineError`` with TensorRT's reason when the build fails, ``OutputError`` when the timing cache
    cannot be written.
    """
    config = toolkit.create_config(builder, options)
    if options.version_compatible:
        config.plugins_to_serialize = list(libraries)
    if canvases or batch[0] != batch[2]:
        _add_profiles(builder, config, network, batch, canvases)
    cache_file = None if timing_cache is None else _load_timing_cache(toolkit, config, timing_cache)
    monitor = config.progress_monitor = _monitor(toolkit.trt, progress)
    # In a thread of its own, so that this one hears Ctrl-C at once and can pass it on.
    with captured_log() as records, concurrent.futures.ThreadPoolExecutor(1) as pool:
        running = pool.submit(builder.build_serialized_network, network, config)
        try:
            while not concurrent.futures.wait([running], timeout=_WAKE_S).done:
                pass  # Windows delivers a Ctrl-C only between two waits
        except BaseException:
            monitor.cancelled = True  # leaving the block waits for the thread
            raise
    if monitor.failure is not None:
        raise monitor.failure
    plan = running.result()
    texts = [(record.levelname, " ".join(record.getMessage().split())) for record in records]
    if plan is None:
        failed = [record for record in records if record.levelname == "ERROR"]
        # A plugin of ours tells why, TensorRT only that it refused.
        failed = [record for record in failed if record.name == plugin_log.name] or failed
        reason = one_line(failed[-1].getMessage()) if failed else "no reason given"
        raise AnchorlineError(f"{toolkit.title} {toolkit.version} could not build the engine: {reason}")
    if cache_file is not None:
        atomic_write_bytes(cache_file, bytes(config.get_timing_cache().serialize()))
    found = [int(match) for _, text in texts for match in _ACTIVATION.findall(text)]
    profiles = max(1, len(canvases))  # each tells of its own
    memory = found[-profiles:] if len(found) >= profiles else [None] * profiles
    warnings = [text for level, text in texts if level == "WARNING"]
    return Plan(bytes(plan), tuple(memory), _readable(warnings))


def _add_profiles(
    builder: Any, config: Any, network: Any, batch: Batch, canvases: Sequence[CanvasRange]
) -> None:
    """An optimisation profile for each of the ``canvases``, or one where no sides are free."""
    ranges: Sequence[tuple[tuple[int, ...], ...]] = canvases or [((), (), ())]
    for sides in ranges:
        profile = builder.create_optimization_profile()
        for tensor in map(network.get_input, range(network.num_inputs)):
            _, *stated = tuple(tensor.shape)
            free = stated.count(-1)
            shapes = [(size, *side[:free], *stated[free:]) for size, side in zip(batch, sides, strict=True)]
            profile.set_shape(tensor.name, *shapes)
        config.add_optimization_profile(profile)


@dataclass
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


def _monitor(trt: Any, progress: Progress | None) -> Any:
    """TensorRT's progress monitor, which calls ``progress``.

    An error of that ends the build and is kept as ``failure``; so does setting ``cancelled``.
    """

    class Monitor(trt.IProgressMonitor):
        """Phases have steps, some of which stand for whole phases of their own."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases: dict[str, _Phase] = {}
            self.reached = 0.0  # it never falls
            self.cancelled = False
            self.failure: BaseException | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.phases[phase_name] = _Phase(parent_phase, max(num_steps, 1))

        def phase_finish(self, phase_name: str) -> None:
            self.phases.pop(phase_name, None)

        def step_complete(self, phase_name: str, step: int) -> bool:
            """False ends the build."""
            if phase_name in self.phases:
                self.phases[phase_name].done = step + 1
            roots = [name for name, phase in self.phases.items() if phase.parent not in self.phases]
            if roots:
                self.reached = max(self.reached, self.fraction(roots[0]))
            try:
                if progress is not None:
                    progress(int(self.reached * _STEPS), _STEPS)
            except BaseException as error:
                self.failure, self.cancelled = error, True
            return not self.cancelled

        def fraction(self, name: str) -> float:
            inside = [self.fraction(child) for child, phase in self.phases.items() if phase.parent == name]
            phase = self.phases[name]
            return min((phase.done + max(inside, default=0.0)) / phase.steps, 1.0)

    return Monitor()


def _load_timing_cache(toolkit: Toolkit, config: Any, folder: Path) -> Path:
    """Give ``config`` the timings of earlier builds on this GPU with this version; returns their file."""
    if toolkit.gpu is None:
        raise SettingsError(
            f"timing cache is {str(folder)!r}; {toolkit.title} times nothing when it builds, leave it out"
        )
    gpu = re.sub(r"[^A-Za-z0-9]+", "-", toolkit.gpu)
    file = folder / f"{toolkit.name}-{toolkit.version}-{gpu}.cache"
    content = file.read_bytes() if file.is_file() else b""
    if not config.set_timing_cache(config.create_timing_cache(content), ignore_mismatch=False):
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    return file


def _readable(warnings: Sequence[str]) -> tuple[str, ...]:
    """Each warning once, with how often it came."""
    counts = Counter(warnings).items()
    lines = [text if count == 1 else f"{text} ({count} times)" for text, count in counts]
    if len(lines) > _MOST_WARNINGS:
        lines[_MOST_WARNINGS:] = [f"... and {len(lines) - _MOST_WARNINGS} more"]
    return tuple(lines)
