"""From a checkpoint to one ONNX file that every runtime takes, checked against the model it came from.

>>> export_onnx("model.safetensors", "model.onnx")

``import_checkpoint`` makes the checkpoint from another library's; ``quantize_onnx`` turns the file's layers
into 8-bit integers, without PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anchorline.export.importers.conversion import ImportResult, import_checkpoint
    from anchorline.export.onnx_export import ExportResult, export_onnx
    from anchorline.export.quantization import QuantizeResult, quantize_onnx

# Loaded when first used: PyTorch takes seconds, and not every function needs it.
_ON_DEMAND = {
    "ExportResult": "onnx_export",
    "ImportResult": "importers.conversion",
    "QuantizeResult": "quantization",
    "export_onnx": "onnx_export",
    "import_checkpoint": "importers.conversion",
    "quantize_onnx": "quantization",
}

__all__ = [
    "ExportResult",
    "ImportResult",
    "QuantizeResult",
    "export_onnx",
    "import_checkpoint",
    "quantize_onnx",
]


def __getattr__(name: str) -> Any:
    if name not in _ON_DEMAND:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ON_DEMAND[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
