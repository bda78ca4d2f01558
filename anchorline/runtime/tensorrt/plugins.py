"""The custom ops as TensorRT plugins: ``anchorline::BatchedNMS`` and ``anchorline::RoIPool``.

An op says in plain Python what its output looks like and which kernels compute it; ``register_plugins`` makes
TensorRT plugins (``IPluginV3``) of them, for TensorRT and TensorRT for RTX, before an engine that holds them
is built or loaded. Nothing here imports TensorRT or CUDA before it is used, and building an engine never does
use CUDA.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.contract import DOMAIN, OP_VERSION
from anchorline.runtime.io.errors import AnchorlineError, ArtefactError, one_line
from anchorline.runtime.tensorrt.cuda import call_driver, compute_capability, launch_kernel
from anchorline.runtime.tensorrt.kernels import Launch, image
from anchorline.runtime.tensorrt.library import FLAVOURS, tensorrt_logger

PLUGIN_NAMESPACE, PLUGIN_VERSION = DOMAIN, str(OP_VERSION)

MAX_BOXES = 8192  # of a group: the words of bits that nms_select keeps in shared memory
MAX_GROUPS = 65535  # a grid's third side
TILE = 64  # NMS_TILE, the bits of a word
SMALL = 256  # NMS_SMALL: up to here one kernel without scratch memory
_WORD_BYTES = 8
_MOST_THREADS = 1024
_POOL_THREADS = 256
_POOL_KERNELS = {"float32": "roi_pool_f32", "float16": "roi_pool_f16"}

Shape = Sequence[int]

log = logging.getLogger("anchorline.tensorrt.plugins")  # below TensorRT's, as the reason of what it refuses


@dataclass(frozen=True)
class Call:
    """The tensors of one execution: shapes of the inputs, their types, and device addresses."""

    shapes: tuple[tuple[int, ...], ...]
    types: tuple[str, ...]
    inputs: tuple[int, ...]
    output: int
    workspace: int = 0


class BatchedNMS:
    """boxes [G, N, 4] xyxy and scores [G, N] in falling order, float32 -> scores [G, N], suppressed ones -1.

    What counts and what is suppressed is defined in ``anchorline/train/model/ops.py`` and exact to the bit.
    ``iou_threshold`` lies in [0, 1]; N is at most 8192. The kernels are in ``kernels/nms.cu``.
    """

    name: ClassVar[str] = "BatchedNMS"
    attributes: ClassVar[dict[str, type]] = {"iou_threshold": float, "score_threshold": float}
    output_like: ClassVar[int] = 1  # the input whose type the output has
    source: ClassVar[str] = "nms"
    kernels: ClassVar[tuple[str, ...]] = ("nms_overlaps", "nms_select", "nms_small")

    def __init__(self, *, iou_threshold: float, score_threshold: float) -> None:
        if not 0.0 <= iou_threshold <= 1.0:
            raise ArtefactError(f"BatchedNMS: iou_threshold is {iou_threshold}; expected 0 to 1")
        self.iou_threshold, self.score_threshold = iou_threshold, score_threshold

    def accepts(self, position: int, types: Sequence[str]) -> bool:
        """Whether the tensor at ``position`` of inputs and output may have the last of ``types``."""
        return types[position] == "float32"

    def output_shape(self, shapes: Sequence[Sequence[Any]], product: Callable[[Any, Any], Any]) -> list[Any]:
        """The output's shape from the inputs', which may be symbolic; ``product`` multiplies two sides."""
        return list(shapes[1])

    def check_sizes(self, shapes: Sequence[Shape]) -> None:
        """Raise ``ArtefactError`` for more than the kernels take."""
        groups, boxes = shapes[1]
        if boxes > MAX_BOXES or groups > MAX_GROUPS:
            raise ArtefactError(
                f"BatchedNMS: {groups} groups of {boxes} boxes; the plugin takes at most {MAX_GROUPS} of "
                f"{MAX_BOXES}: export with fewer proposals, or build for smaller batches"
            )

    def workspace_bytes(self, shapes: Sequence[Shape]) -> int:
        """The overlap matrix on and above its diagonal, in tiles of 64x64 bits: below N * N / 8 a group."""
        groups, boxes = shapes[1]
        words = -(-boxes // TILE)
        return 0 if boxes <= SMALL else groups * words * (words + 1) // 2 * TILE * _WORD_BYTES

    def launches(self, call: Call) -> list[Launch]:
        """The kernels to run, in order."""
        self.check_sizes(call.shapes)
        groups, boxes = call.shapes[1]
        if groups == 0 or boxes == 0:
            return []
        inputs = tuple(ctypes.c_void_p(address) for address in call.inputs)
        kept, tiles = ctypes.c_void_p(call.output), ctypes.c_void_p(call.workspace)
        count, iou = ctypes.c_int(boxes), ctypes.c_float(self.iou_threshold)
        score = ctypes.c_float(self.score_threshold)
        words = -(-boxes // TILE)
        if boxes <= SMALL:
            small = (*inputs, kept, count, iou, score)
            return [Launch(self.source, "nms_small", (groups, 1, 1), words * TILE, small)]
        grid = (words + 1, (words + 1) // 2, groups)
        threads = min(_MOST_THREADS, 32 * max(2, words))
        return [
            Launch(self.source, "nms_overlaps", grid, TILE, (*inputs, tiles, count, iou, score)),
            Launch(self.source, "nms_select", (groups, 1, 1), threads, (*inputs, tiles, kept, count, score)),
        ]


class RoIPool:
    """features [B, C, H, W] and rois [B, R, 4] xyxy in image pixels -> [B * R, C, S, S].

    The same numbers as ONNX's MaxRoiPool and torchvision's roi_pool. Features are float32 or float16,
    RoIs float32. ``output_size`` is S; ``spatial_scale`` takes image pixels to feature pixels. The methods
    are those of ``BatchedNMS``, the kernels in ``kernels/roi_pool.cu``.
    """

    name: ClassVar[str] = "RoIPool"
    attributes: ClassVar[dict[str, type]] = {"output_size": int, "spatial_scale": float}
    output_like: ClassVar[int] = 0
    source: ClassVar[str] = "roi_pool"
    kernels: ClassVar[tuple[str, ...]] = tuple(_POOL_KERNELS.values())

    def __init__(self, *, output_size: int, spatial_scale: float) -> None:
        if output_size < 1 or not spatial_scale > 0.0:
            raise ArtefactError(
                f"RoIPool: output_size is {output_size} and spatial_scale {spatial_scale}; "
                "expected at least 1 and above 0"
            )
        self.output_size, self.spatial_scale = output_size, spatial_scale

    def accepts(self, position: int, types: Sequence[str]) -> bool:
        if position == 0:
            return types[0] in _POOL_KERNELS
        return types[position] == ("float32" if position == 1 else types[0])

    def output_shape(self, shapes: Sequence[Sequence[Any]], product: Callable[[Any, Any], Any]) -> list[Any]:
        (_, channels, _, _), (images, rois, _) = shapes
        return [product(images, rois), channels, self.output_size, self.output_size]

    def check_sizes(self, shapes: Sequence[Shape]) -> None: ...

    def workspace_bytes(self, shapes: Sequence[Shape]) -> int:
        return 0

    def launches(self, call: Call) -> list[Launch]:
        (_, channels, height, width), (images, rois, _) = call.shapes
        total = images * rois * channels * self.output_size**2
        if total == 0:
            return []
        arguments = (
            *(ctypes.c_void_p(address) for address in (*call.inputs, call.output)),
            *(ctypes.c_int(value) for value in (rois, channels, height, width, self.output_size)),
            ctypes.c_float(self.spatial_scale),
            ctypes.c_longlong(total),
        )
        grid = (-(-total // _POOL_THREADS), 1, 1)
        return [Launch(self.source, _POOL_KERNELS[call.types[0]], grid, _POOL_THREADS, arguments)]


Op = BatchedNMS | RoIPool
PLUGINS: tuple[type[Op], ...] = (BatchedNMS, RoIPool)

# Launching, in whichever context TensorRT calls: the images are loaded once a process for all of them.

_libraries: dict[tuple[str, int], Any] = {}
_loading = threading.Lock()


def launch(launches: Iterable[Launch], stream: int) -> None:
    """Put the kernels on ``stream`` (an address) of the current CUDA context; waits for nothing.

    The first launch on a GPU loads the kernels' image, see ``preload``. Raises ``AnchorlineError``.
    """
    from cuda.bindings import driver

    for item in launches:
        # The driver takes a kernel of a library for a function.
        handle = driver.CUfunction(int(_kernel(item.source, item.kernel, _current_device())))
        launch_kernel(driver, handle, item, stream, doing=f"launching {item.kernel}")


def preload(source: str, kernels: Iterable[str]) -> None:
    """Load kernels ahead of their first launch, which then allocates nothing and may be captured."""
    for kernel in kernels:  # a handle alone is loaded when it is launched
        handle = _kernel(source, kernel, _current_device())
        _call("cuKernelGetFunction", handle, doing=f"loading {kernel}")


def _current_device() -> int:
    return int(_call("cuCtxGetDevice", doing="finding the current GPU"))


@functools.cache
def _kernel(source: str, kernel: str, device: int) -> Any:
    from cuda.bindings import driver

    library = _library(source, compute_capability(driver, device))
    return _call("cuLibraryGetKernel", library, kernel.encode(), doing=f"finding {kernel}")


def _library(source: str, architecture: int) -> Any:
    """An image loaded for all contexts of the process, once: TensorRT calls from many threads."""
    with _loading:
        if (source, architecture) not in _libraries:
            none: list[Any] = []  # no options, for compiler or library
            given = (image(source, architecture), none, none, 0, none, none, 0)
            loaded = _call("cuLibraryLoadData", *given, doing=f"loading the image of {source}")
            _libraries[source, architecture] = loaded
        return _libraries[source, architecture]


def _call(function: str, *arguments: Any, doing: str) -> Any:
    from cuda.bindings import driver

    return call_driver(driver, function, *arguments, doing=doing)


# TensorRT calls the following from C++ through its Python layer, which discards what enqueue returns: a
# failure is an exception there, and the layer makes an error code of it. It prints that on stderr alone, so
# each is logged as well.

_registered: set[str] = set()  # by the modules' names; the Python layer keeps their creators alive
_registering = threading.Lock()
# Every plugin made, a few hundred bytes each. A cancelled build of TensorRT for RTX 1.7 destroys its clones
# twice over, which corrupts the heap once Python has freed them.
_plugins: list[Any] = []


def register_plugins(trt: Any) -> None:
    """Make the ops known to the module ``trt``, ``tensorrt`` or ``tensorrt_rtx``; once is enough.

    And TensorRT's own plugins to itself: its parser imports RoiAlign as ``ROIAlign_TRT``, which nobody has
    registered before. TensorRT for RTX has none.
    """
    with _registering:
        if trt.__name__ in _registered:
            return
        if trt.__name__ == FLAVOURS["tensorrt"].module and not trt.init_libnvinfer_plugins(
            tensorrt_logger("tensorrt"), ""
        ):
            raise AnchorlineError("TensorRT does not register its own plugins; install it again")
        registry = trt.get_plugin_registry()
        for creator in map(_creator_class(trt), PLUGINS):
            if not registry.register_creator(creator, PLUGIN_NAMESPACE):
                raise AnchorlineError(
                    f"{trt.__name__}: another plugin {PLUGIN_NAMESPACE}::{creator.name} version "
                    f"{PLUGIN_VERSION} is registered in this process; load only one"
                )
        _registered.add(trt.__name__)


def _plugin_class(trt: Any) -> type:
    """The plugin class over ``trt``'s base classes; one class serves every op."""
    types = {trt.float32: "float32", trt.float16: "float16"}
    bases = (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime)

    class Plugin(*bases):  # type: ignore[misc]
        """A plugin for one node: its op with the attributes; ``loaded`` from an engine, or to build one."""

        def __init__(self, op: Op, loaded: bool) -> None:
            for base in bases:
                base.__init__(self)
            self.op, self.loaded = op, loaded
            self.plugin_name, self.plugin_namespace = op.name, PLUGIN_NAMESPACE
            self.plugin_version, self.num_outputs = PLUGIN_VERSION, 1
            # What TensorRT reads, also after get_fields_to_serialize has returned.
            self.values = {
                name: np.array([getattr(op, name)], np.float32 if kind is float else np.int32)
                for name, kind in op.attributes.items()
            }
            self.fields = _fields(trt, op.attributes, self.values)
            _plugins.append(self)

        def get_capability_interface(self, kind: Any) -> Plugin:
            return self

        def clone(self) -> Plugin:
            return Plugin(self.op, self.loaded)

        def attach_to_context(self, context: Any) -> Plugin:
            if self.loaded:
                with _logged(f"loading the kernels of {self.op.name}"):
                    preload(self.op.source, self.op.kernels)
            return self.clone()

        def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
            return [input_types[self.op.output_like]]

        def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Any, builder: Any) -> list[Any]:
            def product(a: Any, b: Any) -> Any:
                return builder.operation(trt.DimensionOperation.PROD, a, b)

            sides = self.op.output_shape([list(shape) for shape in inputs], product)
            constants = [builder.constant(side) if isinstance(side, int) else side for side in sides]
            return [trt.DimsExprs(constants)]

        def supports_format_combination(self, position: int, tensors: Sequence[Any], inputs: int) -> bool:
            descriptions = [getattr(tensor, "desc", tensor) for tensor in tensors[: position + 1]]
            names = [types.get(description.type, "other") for description in descriptions]
            linear = descriptions[position].format == trt.TensorFormat.LINEAR
            return bool(linear and self.op.accepts(position, names))

        def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            with _logged(f"preparing {self.op.name}"):
                self.op.check_sizes([tuple(tensor.max) for tensor in inputs])

        def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            """Nothing to do, here and in the next."""

        def set_tactic(self, tactic: int) -> None: ...

        def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
            return self.op.workspace_bytes([tuple(tensor.max) for tensor in inputs])

        def get_valid_tactics(self) -> list[int]:
            return []

        def get_fields_to_serialize(self) -> Any:
            return self.fields

        def enqueue(
            self,
            input_desc: Sequence[Any],
            output_desc: Sequence[Any],
            inputs: Sequence[int],
            outputs: Sequence[int],
            workspace: int,
            stream: int,
        ) -> None:
            with _logged(f"running {self.op.name}"):
                shapes = tuple(tuple(description.dims) for description in input_desc)
                names = tuple(types[description.type] for description in input_desc)
                call = Call(shapes, names, tuple(inputs), outputs[0], workspace)
                launch(self.op.launches(call), stream)

    return Plugin


def _creator_class(trt: Any) -> type:
    plugin_class = _plugin_class(trt)

    class Creator(trt.IPluginCreatorV3One):
        """Makes the plugin of one node from the node's attributes."""

        def __init__(self, op: type[Op]) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.op, self.name = op, op.name
            self.plugin_namespace, self.plugin_version = PLUGIN_NAMESPACE, PLUGIN_VERSION
            self.values = {name: np.array([]) for name in op.attributes}
            self.field_names = _fields(trt, op.attributes, self.values)

        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            with _logged(f"creating {self.op.name}"):
                given = {field.name: field.data for field in fields}
                missing = set(self.op.attributes) - set(given)
                if missing:
                    raise AnchorlineError(f"node {name} has no attribute {', '.join(sorted(missing))}")
                values = {n: kind(given[n].item()) for n, kind in self.op.attributes.items()}
                return plugin_class(self.op(**values), loaded=phase == trt.TensorRTPhase.RUNTIME)

    return Creator


def _fields(trt: Any, attributes: dict[str, type], values: dict[str, NDArray[Any]]) -> Any:
    """An op's attributes as TensorRT takes them. It copies no values: the arrays must live on.

    The class with the underscore is the structure itself. Of the list without it one would be made at each
    call, which the Python layer can only do below a call from Python, not in TensorRT's own threads.
    """
    kinds = {float: trt.PluginFieldType.FLOAT32, int: trt.PluginFieldType.INT32}
    fields = [trt.PluginField(name, values[name], kinds[kind]) for name, kind in attributes.items()]
    return trt.PluginFieldCollection_(trt.PluginFieldCollection(fields))


@contextlib.contextmanager
def _logged(doing: str) -> Iterator[None]:
    try:
        yield
    except AnchorlineError as error:
        log.error("%s failed: %s", doing, error)
        raise
    except Exception as error:
        log.error("%s failed: %s", doing, one_line(error))
        raise
