"""``deploy_triton``: a model repository for NVIDIA's Triton Inference Server.

    NAME               ensemble: encoded images in, boxes in their own pixels out
    NAME_preprocess    Python: decodes, lays the frames onto canvases
    NAME_network       onnxruntime, OpenVINO or TensorRT: the file that was handed over
    NAME_postprocess   Python: the boxes back in the pixels of the images

The configurations are those of ``model_config.proto`` in triton-inference-server/common; which shapes and
batches each backend takes was read in the backends' own sources (docs/deploy.md).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anchorline import __version__
from anchorline.deploy.source import Source, batch_limit, hashes, new_folder, open_source, origin, template
from anchorline.runtime.backends.onnxruntime import write_inlined
from anchorline.runtime.contract import CONTRACT_KEY, NMS_CONVERGED
from anchorline.runtime.io.errors import ArtefactError, SettingsError
from anchorline.runtime.tensorrt.manifest import manifest_path

BACKENDS = ("onnxruntime", "openvino", "tensorrt")
_DEFAULT_BATCH = 8
_QUEUE_DELAY_US = 1000  # for how long a request waits for others to join it
_FILES = {"onnxruntime": "model.onnx", "openvino": "model.onnx", "tensorrt": "model.plan"}
_PLUGINS = "plugins/libanchorline_plugins.so"


class Word(str):
    """A value of an enumeration, which stands without quotes."""


@dataclass(frozen=True)
class Tensor:
    """An input or output in a configuration; ``dims`` without the batch, which is ``-1``."""

    name: str
    kind: str
    dims: tuple[int, ...]

    def entry(self, batched: bool) -> dict[str, Any]:
        """As a model states it that has a batch of its own (``max_batch_size``), or as one that has not."""
        dims = list(self.dims if batched else (-1, *self.dims))
        return {"name": self.name, "data_type": Word(f"TYPE_{self.kind}"), "dims": dims}


def deploy_triton(
    model: str | Path,
    out: str | Path,
    *,
    backend: str | None = None,
    max_batch: int | None = None,
    compiler: str | None = None,
) -> Path:
    """Write the folder ``out``: a model repository for Triton in ``models/``, a client and a README.

    ``backend`` is ``"onnxruntime"`` (default) or ``"openvino"`` for an ONNX file, ``"tensorrt"`` for an
    engine of full TensorRT. ``max_batch`` is the largest batch that Triton forms (default: the model's own,
    else 8). For an engine with our plugins their library is compiled for Linux by ``compiler``, as
    ``build_plugin_library`` does. Raises ``ArtefactError``, ``SettingsError`` and ``OutputError``.
    """
    source = open_source(model)
    backend = _backend_of(source, backend)
    most = batch_limit(source, max_batch, _DEFAULT_BATCH)
    slots = _slots(source)
    with new_folder(out) as folder:
        _write_network(source, backend, folder / "models" / f"{source.name}_network" / "1")
        if source.manifest is not None and source.manifest.raw.get("plugins"):
            from anchorline.engine.plugin_library import build_plugin_library

            build_plugin_library(folder / _PLUGINS, compiler=compiler, register_on_load=True)
        for step in ("preprocess", "postprocess"):
            _write(folder / "models" / f"{source.name}_{step}" / "1" / "model.py", template(f"{step}.py"))
        (folder / "models" / source.name / "1").mkdir(
            parents=True
        )  # an ensemble has a version, and nothing in it
        # A folder without a file is lost in git and in object stores.
        _write(folder / "models" / source.name / "1" / ".keep", "")
        for config in _configurations(source, backend, most, slots):
            _write(folder / "models" / config["name"] / "config.pbtxt", pbtxt(config))
        _write(folder / "client.py", template("client.py").replace("@NAME@", source.name))
        _write(folder / "README.md", _readme(source, backend, most, folder))
    return Path(out)


def _backend_of(source: Source, asked: str | None) -> str:
    if source.manifest is None:
        if asked not in (None, "onnxruntime", "openvino"):
            raise SettingsError(f"backend is {asked!r}; an ONNX file runs on 'onnxruntime' or 'openvino'")
        if asked == "openvino" and source.contract.winograd:
            raise SettingsError(
                "backend is 'openvino', which takes bf16 where the processor has it, and the convolutions of "
                f"{source.path} are in Winograd's form, for fp32; take 'onnxruntime', or export it without "
                "--winograd"
            )
        return asked or "onnxruntime"
    if asked not in (None, "tensorrt"):
        raise SettingsError(f"backend is {asked!r}; an engine runs on 'tensorrt'")
    manifest = source.manifest
    if manifest.flavour != "tensorrt":
        raise ArtefactError(
            f"{source.path}: is an engine of {manifest.flavour}, which Triton does not load; build it for "
            "tensorrt, with the release that the server has"
        )
    if manifest.batch[0] > 1:
        raise ArtefactError(
            f"{source.path}: takes batches of at least {manifest.batch[0]}, and Triton forms smaller ones; "
            "build it with --batch 1:N:N"
        )
    return "tensorrt"


def _slots(source: Source) -> int:
    """How many boxes the outputs have room for; -1 for an engine, whose manifest does not say."""
    if source.manifest is not None:
        return -1
    import onnx

    graph = onnx.load(source.path, load_external_data=False).graph
    scores = next(value for value in graph.output if value.name == source.contract.outputs[1])
    return int(scores.type.tensor_type.shape.dim[1].dim_value) or -1


def _write_network(source: Source, backend: str, folder: Path) -> None:
    folder.mkdir(parents=True)
    target = folder / _FILES[backend]
    if backend == "openvino":  # knows no model-local functions
        write_inlined(source.path, target)
    else:
        shutil.copyfile(source.path, target)
    if source.manifest is not None:
        shutil.copyfile(manifest_path(source.path), manifest_path(target))


def _configurations(source: Source, backend: str, most: int, slots: int) -> Iterator[dict[str, Any]]:
    """``config.pbtxt`` of the four models."""
    contract, name = source.contract, source.name
    kind = {"uint8": "UINT8", "float32": "FP32"}[contract.input_dtype]
    images = Tensor(contract.inputs[0], kind, (*(contract.canvas or (-1, -1)), 3))
    valid, sizes = Tensor(contract.inputs[1], "FP32", (2,)), Tensor("frame_sizes", "INT32", (2,))
    shapes = [("FP32", (slots, 4)), ("FP32", (slots,)), ("INT32", (slots,))]
    raw = [Tensor(n, *shape) for n, shape in zip(contract.outputs[:-1], shapes, strict=False)]
    counts = Tensor(contract.outputs[-1], "INT32", (1,))
    names = ("boxes", "scores", "labels")
    found = [Tensor(n, *shape) for n, shape in zip(names, shapes, strict=True)]
    found.append(Tensor("num_detections", "INT32", (1,)))
    picture = Tensor("image", "STRING", (1,))
    # An output that has no batch cannot be joined, and OpenVINO's backend pads every batch to the largest.
    batched = backend != "openvino" and not _tells_convergence(source)
    promised = {CONTRACT_KEY: contract.to_json(), "canvases": json.dumps(source.canvases)}

    yield {
        "name": f"{name}_preprocess",
        "backend": "python",
        "max_batch_size": most,
        "input": [picture.entry(True)],
        "output": [each.entry(True) for each in (images, valid, sizes)],
        "instance_group": [{"count": 2, "kind": Word("KIND_CPU")}],
        "parameters": _parameters(promised),
    }
    yield _network(source, backend, most if batched else 0, [images, valid], raw, counts)
    yield {
        "name": f"{name}_postprocess",
        "backend": "python",
        "max_batch_size": most if batched else 0,
        "input": [
            *(each.entry(batched) for each in raw),
            counts.entry(batched) if batched else {**counts.entry(True), "dims": [-1]},
            *(each.entry(batched) for each in (valid, sizes)),
        ],
        "output": [each.entry(batched) for each in found],
        "instance_group": [{"count": 1, "kind": Word("KIND_CPU")}],
        "parameters": _parameters(promised),
    }
    steps = [
        ("preprocess", [(picture, picture)], [(each, each) for each in (images, valid, sizes)]),
        ("network", [(images, images), (valid, valid)], [(each, _inner(each)) for each in (*raw, counts)]),
        (
            "postprocess",
            [*((each, _inner(each)) for each in (*raw, counts)), (valid, valid), (sizes, sizes)],
            [(each, each) for each in found],
        ),
    ]
    yield {
        "name": name,
        "platform": "ensemble",
        "max_batch_size": most,
        "input": [picture.entry(True)],
        "output": [each.entry(True) for each in found],
        "ensemble_scheduling": {
            "step": [
                {
                    "model_name": f"{name}_{step}",
                    "model_version": -1,
                    "input_map": [_mapped(*pair) for pair in given],
                    "output_map": [_mapped(*pair) for pair in made],
                }
                for step, given, made in steps
            ]
        },
        "parameters": _parameters({CONTRACT_KEY: contract.to_json()}),
    }


def _network(
    source: Source, backend: str, most: int, given: Sequence[Tensor], raw: Sequence[Tensor], counts: Tensor
) -> dict[str, Any]:
    batched = most > 0
    # The count of each image is one number, [B] in the graph; Triton's tensors have a size beside the batch.
    count: dict[str, Any] = {**counts.entry(True), "reshape": {"shape": []}} if batched else {}
    outputs = [*(each.entry(batched) for each in raw), count or {**counts.entry(True), "dims": [-1]}]
    if _tells_convergence(source):
        outputs.append({"name": NMS_CONVERGED, "data_type": Word("TYPE_BOOL"), "dims": [1]})
    group: dict[str, Any] = {"count": 1, "kind": Word("KIND_GPU" if backend == "tensorrt" else "KIND_AUTO")}
    if backend == "openvino":
        group["kind"] = Word("KIND_CPU")
    if len(source.canvases) > 1:
        group["profile"] = [str(number) for number in range(len(source.canvases))]
    return {
        "name": f"{source.name}_network",
        "backend": backend,
        "default_model_filename": _FILES[backend],
        "max_batch_size": most,
        "input": [each.entry(batched) for each in given],
        "output": outputs,
        "instance_group": [group],
        **({"dynamic_batching": {"max_queue_delay_microseconds": _QUEUE_DELAY_US}} if most > 1 else {}),
    }


def _tells_convergence(source: Source) -> bool:
    return source.manifest is not None and source.manifest.options.get("nms") == "fixed-point"


def _inner(tensor: Tensor) -> Tensor:
    """An output of the network inside the ensemble, whose own outputs may be called the same."""
    return Tensor(f"network_{tensor.name}", tensor.kind, tensor.dims)


def _mapped(own: Tensor, shared: Tensor) -> dict[str, str]:
    return {"key": own.name, "value": shared.name}


def _parameters(values: Mapping[str, str]) -> list[dict[str, Any]]:
    return [{"key": key, "value": {"string_value": value}} for key, value in values.items()]


def pbtxt(message: Mapping[str, Any], indent: str = "") -> str:
    """A message in protobuf's text format: dictionaries are messages, lists repeat."""
    lines = []
    for name, value in message.items():
        if isinstance(value, Mapping):
            lines.append(f"{indent}{name} {{\n{pbtxt(value, indent + '  ')}{indent}}}\n")
        elif isinstance(value, list) and all(isinstance(each, Mapping) for each in value) and value:
            lines += [pbtxt({name: each}, indent) for each in value]
        else:
            shown = f"[{', '.join(map(_scalar, value))}]" if isinstance(value, list) else _scalar(value)
            lines.append(f"{indent}{name}: {shown}\n")
    return "".join(lines)


def _scalar(value: str | int) -> str:
    if isinstance(value, Word | int):
        return str(value)
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _server_options(source: Source, folder: Path) -> str:
    """What the server has to be told beside where the models are."""
    told = []
    if (folder / _PLUGINS).is_file():
        told.append(f"plugins=/deploy/{_PLUGINS}")
    if source.manifest is not None and source.manifest.options.get("version_compatible"):
        told.append("version-compatible=true")
    return "".join(f" \\\n     --backend-config=tensorrt,{option}" for option in told)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _readme(source: Source, backend: str, most: int, folder: Path) -> str:
    options = _server_options(source, folder)
    gpus = "--gpus all " if backend == "tensorrt" else ""
    manifest = source.manifest
    needs = f"Any image with the backends {backend} and python."
    if manifest is not None:
        needs = f"An image whose TensorRT is {manifest.flavour_version}, which built the engine."
    joined = (
        f"Triton joins requests whose canvases are equal, up to {most} images."
        if backend != "openvino" and not _tells_convergence(source)
        else "Triton runs each request by itself here (docs/deploy.md says why): "
        f"send up to {most} images in one."
    )
    return (
        template("triton.md")
        .replace("@NAME@", source.name)
        .replace("@ORIGIN@", origin(source))
        .replace("@VERSION@", __version__)
        .replace("@GPUS@", gpus)
        .replace("@OPTIONS@", options)
        .replace("@NEEDS@", needs)
        .replace("@JOINED@", joined)
        .replace("@FRAMES@", source.manifest.frame_sizes if source.manifest else source.contract.frame_sizes)
        .replace("@HASHES@", hashes(folder))
    )
