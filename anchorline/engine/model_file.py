"""The exported ONNX file as the engine stage takes it: what must be in it, and its contract."""

from __future__ import annotations

from pathlib import Path

import onnx

from anchorline.runtime.contract import CONTRACT_KEY, Contract
from anchorline.runtime.io.errors import ArtefactError

# The functions in the file and those put in their place are written for this opset.
OPSET = 18
# The first whose QuantizeLinear takes scales in half precision. Nothing of ours has another meaning in it;
# in the next one GridSample does.
HALF_SCALES_OPSET = 19


def read_model(path: Path) -> onnx.ModelProto:
    """Load and check an exported ONNX file.

    Raises ``ArtefactError`` for a file that is missing, unreadable, no ONNX, or not an export of ours.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ArtefactError(f"{path}: no such file; give an ONNX file written by anchorline export") from None
    except OSError as error:
        raise ArtefactError(f"{path}: cannot be read ({error.strerror or error}); check the file") from error
    try:
        model = onnx.load_model_from_string(content)
    except Exception as error:  # protobuf's exceptions differ between its implementations
        raise ArtefactError(
            f"{path}: not an ONNX file, or one that was cut off; export or copy it again"
        ) from error
    check_exported(model, str(path))
    return model


def check_exported(model: onnx.ModelProto, where: str = "model") -> Contract:
    """The contract of ``model``, an exported file or what this stage made of one.

    Raises ``ArtefactError`` naming what is missing: graph, contract, opset, or a tensor of the contract.
    ``where`` names the file in the message.
    """
    if not model.graph.node:
        raise ArtefactError(f"{where}: has no graph; give an ONNX file written by anchorline export")
    contract = _contract(model, where)
    opsets = {opset.domain or "ai.onnx": opset.version for opset in model.opset_import}
    if opsets.get("ai.onnx") not in (OPSET, HALF_SCALES_OPSET):
        raise ArtefactError(
            f"{where}: ONNX opset is {opsets.get('ai.onnx', 'not stated')}; expected {OPSET}; "
            "export the model again with this anchorline"
        )
    for kind, values, wanted in (
        ("input", model.graph.input, contract.inputs),
        ("output", model.graph.output, contract.outputs),
    ):
        missing = [name for name in wanted if name not in {value.name for value in values}]
        if missing:
            raise ArtefactError(
                f"{where}: the graph has no {kind} {', '.join(missing)}, which its contract names; "
                "export the model again"
            )
    return contract


def _contract(model: onnx.ModelProto, where: str) -> Contract:
    for entry in model.metadata_props:
        if entry.key == CONTRACT_KEY:
            return Contract.from_json(entry.value, where=where)
    raise ArtefactError(
        f"{where}: has no anchorline contract, so it is not an export of ours; "
        "make one with anchorline export model.safetensors --out model.onnx"
    )


def state_opset(model: onnx.ModelProto, version: int) -> None:
    """Let the graph of ``model`` and all its functions be of ONNX's ``version``, in place."""
    for holder in (model, *model.functions):
        for opset in holder.opset_import:
            if not opset.domain:
                opset.version = version
