"""Ops as TensorRT plugins (``IPluginV3``), for whichever of TensorRT's Python modules is handed in.

TensorRT calls these methods from C++, where an exception cannot be caught by anyone: each failure is
logged here and returned as TensorRT expects it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from anchorline.runtime.contract import DOMAIN, OP_VERSION
from anchorline.runtime.io.errors import AnchorlineError
from anchorline.runtime.tensorrt.plugins import driver
from anchorline.runtime.tensorrt.plugins.ops import BatchedNMS, Call, Op, RoIPool

PLUGIN_NAMESPACE, PLUGIN_VERSION = DOMAIN, str(OP_VERSION)
PLUGINS: tuple[type[Op], ...] = (BatchedNMS, RoIPool)

log = logging.getLogger("anchorline.plugins")
_registered: dict[str, list[Any]] = {}  # the creators by module: the registry does not keep them alive
_lock = threading.Lock()
# Every plugin made, a few hundred bytes each. A cancelled build of TensorRT for RTX 1.7 destroys its clones
# twice over, which corrupts the heap once Python has freed them.
_plugins: list[Any] = []


def register_plugins(trt: Any) -> None:
    """Make the ops known to the module ``trt``, ``tensorrt`` or ``tensorrt_rtx``; once is enough."""
    with _lock:
        if trt.__name__ in _registered:
            return
        plugin_class = _plugin_class(trt)
        creators = [_creator_class(trt)(op, plugin_class) for op in PLUGINS]
        registry = trt.get_plugin_registry()
        for creator in creators:
            if not registry.register_creator(creator, PLUGIN_NAMESPACE):
                raise AnchorlineError(
                    f"{trt.__name__}: another plugin {PLUGIN_NAMESPACE}::{creator.name} version "
                    f"{PLUGIN_VERSION} is registered in this process; load only one"
                )
        _registered[trt.__name__] = creators


def _plugin_class(trt: Any) -> type:
    """The plugin class over ``trt``'s base classes; one class serves every op."""
    types = {trt.float32: "float32", trt.float16: "float16"}

    class Plugin(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):
        """A plugin for one node: its op with the attributes; ``loaded`` from an engine, or to build one."""

        def __init__(self, op: Op, loaded: bool) -> None:
            trt.IPluginV3.__init__(self)
            trt.IPluginV3OneCore.__init__(self)
            trt.IPluginV3OneBuild.__init__(self)
            trt.IPluginV3OneRuntime.__init__(self)
            self.op, self.loaded = op, loaded
            self.plugin_name, self.plugin_namespace = op.name, PLUGIN_NAMESPACE
            self.plugin_version, self.num_outputs = PLUGIN_VERSION, 1
            self.fields: Any = None  # what TensorRT reads after get_fields_to_serialize has returned
            _plugins.append(self)

        def get_capability_interface(self, kind: Any) -> Plugin:
            return self

        def clone(self) -> Plugin:
            return Plugin(self.op, self.loaded)

        def attach_to_context(self, context: Any) -> Plugin:
            if self.loaded:
                _guarded(lambda: driver.preload(self.op.source, self.op.kernels), "loading kernels", None)
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
            pass

        def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
            return self.op.workspace_bytes([tuple(tensor.max) for tensor in inputs])

        def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            pass

        def get_valid_tactics(self) -> list[int]:
            return []

        def set_tactic(self, tactic: int) -> None:
            pass

        def get_fields_to_serialize(self) -> Any:
            fields = [
                trt.PluginField(name, _array(kind, getattr(self.op, name)), _field_type(trt, kind))
                for name, kind in self.op.attributes.items()
            ]
            self.fields = trt.PluginFieldCollection(fields)
            return self.fields

        def enqueue(
            self,
            input_desc: Sequence[Any],
            output_desc: Sequence[Any],
            inputs: Sequence[int],
            outputs: Sequence[int],
            workspace: int,
            stream: int,
        ) -> int:
            def run() -> int:
                shapes = tuple(tuple(description.dims) for description in input_desc)
                names = tuple(types[description.type] for description in input_desc)
                call = Call(shapes, names, tuple(inputs), outputs[0], workspace)
                driver.launch(self.op.launches(call), stream)
                return 0

            return int(_guarded(run, f"{self.op.name}.enqueue", failed=1))

    return Plugin


def _creator_class(trt: Any) -> type:
    class Creator(trt.IPluginCreatorV3One):
        """Makes the plugin of one node from the node's attributes."""

        def __init__(self, op: type[Op], plugin_class: type) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.op, self.plugin_class = op, plugin_class
            self.name, self.plugin_namespace = op.name, PLUGIN_NAMESPACE
            self.plugin_version = PLUGIN_VERSION
            self.field_names = trt.PluginFieldCollection(
                [trt.PluginField(n, np.array([]), _field_type(trt, k)) for n, k in op.attributes.items()]
            )

        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            def create() -> Any:
                given = {field.name: field.data for field in fields}
                missing = set(self.op.attributes) - set(given)
                if missing:
                    raise AnchorlineError(f"node {name} has no attribute {', '.join(sorted(missing))}")
                values = {n: kind(given[n].item()) for n, kind in self.op.attributes.items()}
                return self.plugin_class(self.op(**values), loaded=phase == trt.TensorRTPhase.RUNTIME)

            return _guarded(create, f"creating {self.op.name}", failed=None)

    return Creator


def _array(kind: type, value: Any) -> np.ndarray:
    return np.array([value], np.float32 if kind is float else np.int32)


def _field_type(trt: Any, kind: type) -> Any:
    return trt.PluginFieldType.FLOAT32 if kind is float else trt.PluginFieldType.INT32


def _guarded(work: Callable[[], Any], doing: str, failed: Any) -> Any:
    try:
        return work()
    except AnchorlineError as error:
        log.error("%s: %s", doing, error)
    except Exception:
        log.exception("%s failed", doing)
    return failed
