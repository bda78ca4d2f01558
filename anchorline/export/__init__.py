"""From a checkpoint to one ONNX file that every runtime takes, checked against the model it came from.

>>> export_onnx("model.safetensors", "model.onnx")

``import_checkpoint`` makes the checkpoint from another library's; ``quantize_onnx`` turns the file's layers
into 8-bit integers, without PyTorch.
"""

from typing import TYPE_CHECKING

from anchorline.runtime.on_demand import on_demand

if TYPE_CHECKING:
    from anchorline.export.importers.conversion import ImportResult as ImportResult
    from anchorline.export.importers.conversion import import_checkpoint as import_checkpoint
    from anchorline.export.onnx_export import ExportResult as ExportResult
    from anchorline.export.onnx_export import export_onnx as export_onnx
    from anchorline.export.quantization import QuantizeResult as QuantizeResult
    from anchorline.export.quantization import quantize_onnx as quantize_onnx

# PyTorch takes seconds, and not every function needs it.
__all__, __getattr__, __dir__ = on_demand(
    __name__,
    {
        "importers.conversion": "ImportResult import_checkpoint",
        "onnx_export": "ExportResult export_onnx",
        "quantization": "QuantizeResult quantize_onnx",
    },
)
