"""The per-layer report: the parsed network, layer by layer.

TensorRT for RTX compiles all of it into one fused node, so the network tells more than the engine.
"""

from __future__ import annotations

from typing import Any

# Weights and shape arithmetic: hundreds of layers that do no work.
_LEFT_OUT = ("CONSTANT", "SHAPE")
PLUGIN_LAYER = "PLUGIN_V3"


def layer_report(network: Any) -> list[dict[str, Any]]:
    """For each layer its name, type, precision (of its first output) and that output's shape (-1: free)."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    return [_row(layer) for layer in layers if layer.type.name not in _LEFT_OUT and layer.num_outputs]


def plugin_layers(report: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the layers that are plugins."""
    return [row for row in report if row["type"] == PLUGIN_LAYER]


def _row(layer: Any) -> dict[str, Any]:
    output = layer.get_output(0)
    return {
        "name": layer.name,
        "type": layer.type.name,
        "precision": _type_name(output.dtype.name),
        "shape": _shape(output),
    }


def _shape(tensor: Any) -> list[int] | None:
    """The shape, or None where TensorRT does not know how many axes there are."""
    try:
        return [int(side) for side in tensor.shape]
    except ValueError:  # the bindings refuse to list axes of unknown number
        return None


def _type_name(name: str) -> str:
    """TensorRT's name of a type as the manifest has it: FLOAT is fp32."""
    return {"FLOAT": "fp32", "HALF": "fp16"}.get(name, name.lower())
