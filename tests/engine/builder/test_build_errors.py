"""Bad input to a build: one line that helps, exit code 2 at the command, nothing half-written."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

from anchorline import cli
from anchorline.engine import build as builder
from anchorline.engine import toolkit as flavours
from anchorline.engine.build import build_engine
from anchorline.engine.graph import check_exported
from anchorline.engine.options import BuildOptions
from anchorline.runtime.io.errors import ArtefactError, OutputError, SettingsError
from anchorline.runtime.tensorrt.library import load_tensorrt

ModelFile = Callable[[str], Path]
RTX = "tensorrt-rtx"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "tensorflow"}, "target is 'tensorflow'; expected one of tensorrt, tensorrt-rtx"),
        ({"precision": "int8"}, "precision is 'int8'; expected one of fp16, fp32"),
        ({"nms": "soft"}, "nms is 'soft'; expected one of plugin, fixed-point"),
        ({"roi_align": "crop"}, "roi_align is 'crop'; expected one of grid-sample, gather"),
        ({"roi_align": "gather"}, "roi align is gather; TensorRT has RoIAlign itself, so leave it out"),
        ({"workspace": 0}, "workspace is 0; expected a whole number of MiB above 0 or None"),
        ({"optimization_level": 6}, "optimization_level is 6; expected a whole number from 0 to 5 or None"),
        ({"optimization_level": 2.0}, "optimization_level is 2.0; expected a whole number from 0 to 5"),
        ({"batch": (1, 4)}, r"batch is \(1, 4\); expected a list of 3, each a value of type int or None"),
        ({"batch": "1:4:8"}, "batch is '1:4:8'; expected a list of 3"),
        (
            {"target": RTX, "compute_capabilities": ("86",)},
            r"compute_capabilities is \('86',\); expected",
        ),
        ({"version_compatible": "no"}, "version_compatible is 'no'; expected a value of type bool"),
        ({"compute_capabilities": (86,)}, "TensorRT builds for the GPU at hand"),
        ({"target": RTX, "version_compatible": True}, "name the compute capabilities instead"),
        ({"target": RTX, "hardware_compatible": True}, "name the compute capabilities instead"),
    ],
)
def test_options_that_cannot_be_used(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        BuildOptions(**options)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((1, 4, 16), "batch is 1:4:16; the model was exported for at most 8"),
        ((0, 1, 1), "batch is 0:1:1; expected MIN:OPT:MAX with 1 <= MIN <= OPT <= MAX"),
        ((4, 2, 8), "batch is 4:2:8; expected"),
        ((1, 4, 2), "batch is 1:4:2; expected"),
    ],
)
def test_batches_that_cannot_be_built(
    batch: tuple[int, int, int], message: str, model_file: ModelFile, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=message):
        build_engine(model_file("proposals"), tmp_path / "m.engine", BuildOptions(target=RTX, batch=batch))
    assert os.listdir(tmp_path) == []


def test_the_batch_follows_the_export(model_file: ModelFile) -> None:
    contract = check_exported(onnx.load(model_file("proposals")))
    free = dataclasses.replace(contract, max_batch=None)
    assert BuildOptions().resolve_batch(contract) == (1, 1, 8)
    assert BuildOptions().resolve_batch(free) == (1, 1, 1)
    assert BuildOptions(batch=(2, 8, 32)).resolve_batch(free) == (2, 8, 32)


def test_an_unknown_compute_capability_names_the_known_ones(
    rtx: Any, model_file: ModelFile, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=r"compute capability is 90; .* builds for 75, 80, 86, 89, 120"):
        build_engine(
            model_file("proposals"),
            tmp_path / "m.engine",
            BuildOptions(target=RTX, compute_capabilities=(86, 90)),
        )
    assert os.listdir(tmp_path) == []


def test_without_capabilities_turing_is_left_out(rtx: Any) -> None:
    assert 75 not in flavours.load_toolkit(BuildOptions(target=RTX)).capabilities
    assert flavours.load_toolkit(BuildOptions(target=RTX, compute_capabilities=(75,))).capabilities == (75,)


@pytest.mark.parametrize("name", ["model.plan", "model"])
def test_the_output_is_an_engine(name: str, model_file: ModelFile, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"expected a file name that ends in \.engine"):
        build_engine(model_file("proposals"), tmp_path / name, BuildOptions(target=RTX))


def foreign(path: Path) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 18]> g (float[1] x) => (float[1] y) { y = Relu(x) }'
    )
    onnx.save(model, path)


def other_opset(path: Path, source: Path) -> None:
    model = onnx.load(source)
    for opset in model.opset_import:
        if opset.domain == "":
            opset.version = 17
    onnx.save(model, path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "no such file"),
        ("folder", "is a folder"),
        ("text", "not an ONNX file"),
        ("cut off", "not an ONNX file, or one that was cut off"),
        ("foreign", "has no anchorline contract"),
        ("opset", "ONNX opset is 17; expected 18"),
    ],
)
def test_models_that_cannot_be_built(kind: str, message: str, model_file: ModelFile, tmp_path: Path) -> None:
    path, source = tmp_path / "m.onnx", model_file("proposals")
    if kind == "folder":
        path.mkdir()
    elif kind == "text":
        path.write_text("an ONNX file")
    elif kind == "cut off":
        path.write_bytes(source.read_bytes()[:5000])
    elif kind == "foreign":
        foreign(path)
    elif kind == "opset":
        other_opset(path, source)
    with pytest.raises(ArtefactError, match=message):
        build_engine(path, tmp_path / "out" / "m.engine", BuildOptions(target=RTX))
    assert not (tmp_path / "out").exists()


def test_a_graph_without_our_op_is_refused(rtx: Any, model_file: ModelFile, tmp_path: Path) -> None:
    model = onnx.load(model_file("proposals"))
    for node in model.graph.node:
        if node.op_type == "BatchedNMS":
            node.op_type = "BatchedNMS2"
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(ArtefactError, match="anchorline::BatchedNMS"):
        build_engine(tmp_path / "m.onnx", tmp_path / "out" / "m.engine", BuildOptions(target=RTX))
    assert not any((tmp_path / "out").iterdir())


def test_full_tensorrt_that_is_absent_names_its_extra(model_file: ModelFile, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['tensorrt'] = None\n"
        "from anchorline.cli import main\n"
        f"sys.exit(main(['build', {str(model_file('proposals'))!r}, '--out', "
        f"{str(tmp_path / 'm.engine')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr == (
        "anchorline: TensorRT is not installed, and this needs it: pip install 'anchorline[gpu]'\n"
    )
    assert os.listdir(tmp_path) == []


def test_tensorrt_for_rtx_that_is_absent_names_its_extra() -> None:
    code = (
        "import sys; sys.modules['tensorrt_rtx'] = None\n"
        "from anchorline.runtime.tensorrt.library import load_tensorrt\n"
        "try:\n    load_tensorrt('tensorrt-rtx')\n"
        "except Exception as error:\n    print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "SettingsError TensorRT for RTX is not installed" in done.stdout
    assert "pip install 'anchorline[rtx]'" in done.stdout


def test_an_old_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        __version__ = "10.3.0"

    monkeypatch.setitem(sys.modules, "tensorrt", Old)  # type: ignore[arg-type]
    load_tensorrt.cache_clear()
    with pytest.raises(SettingsError, match=r"TensorRT is 10\.3\.0; expected at least 10\.12"):
        load_tensorrt("tensorrt")
    load_tensorrt.cache_clear()


def test_tensorrt_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from anchorline.runtime.tensorrt import cuda

    def no_driver() -> None:
        raise RuntimeError('"cuda" can only be found via system search')

    monkeypatch.setattr(cuda, "first_gpu", no_driver)
    with pytest.raises(SettingsError, match=r"needs an NVIDIA GPU .* \(\"cuda\" can only be found"):
        flavours.current_gpu()


def test_a_full_disk_leaves_nothing(rtx: Any, model_file: ModelFile, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: the manifest fits, the engine does not."""
    out = tmp_path / "m.engine"
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from anchorline.cli import main\n"
        f"sys.exit(main(['build', {str(model_file('proposals'))!r}, '--out', {str(out)!r}, '--for', "
        "'tensorrt-rtx', '--compute-capability', '86']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"anchorline: {out}: cannot be written (File too large)")
    assert done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_a_folder_in_the_way_is_found_before_the_build(
    rtx: Any, model_file: ModelFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m.engine").mkdir()
    monkeypatch.setattr(builder, "serialise", lambda *_: pytest.fail("built all the same"))
    with pytest.raises(OutputError, match="is a folder"):
        build_engine(model_file("proposals"), tmp_path / "m.engine", BuildOptions(target=RTX))
    assert os.listdir(tmp_path) == ["m.engine"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "1:8"], "--batch is '1:8'; expected MIN:OPT:MAX"),
        (["--batch", "a:b:c"], "--batch is 'a:b:c'; expected MIN:OPT:MAX"),
        (
            ["--compute-capability", "8.6"],
            "--compute-capability is '8.6'; expected numbers such as 86,89,120",
        ),
        (["--compute-capability", ","], "--compute-capability is ','; expected numbers"),
    ],
)
def test_the_command_s_own_mistakes(
    arguments: list[str],
    message: str,
    model_file: ModelFile,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["build", str(model_file("proposals")), "--out", str(tmp_path / "m.engine"), "--for", RTX]
    assert cli.main([*command, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_samples_that_do_not_fit_are_refused(model_file: ModelFile, tmp_path: Path, rtx: Any) -> None:
    samples = [{"images": np.zeros((1, 8, 8, 3), np.uint8), "image_sizes": np.ones((1, 2), np.float32)}]
    with pytest.raises(SettingsError, match=r"index: 1 Got: 8 Expected: \d+"):
        build_engine(
            model_file("proposals"), tmp_path / "m.engine", BuildOptions(target=RTX), samples=samples
        )
    assert os.listdir(tmp_path) == []


def test_a_timing_cache_has_no_meaning_without_timing(
    rtx: Any, model_file: ModelFile, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match="times nothing"):
        build_engine(
            model_file("proposals"),
            tmp_path / "m.engine",
            BuildOptions(target=RTX, compute_capabilities=(86,)),
            timing_cache=tmp_path / "cache",
        )
    assert os.listdir(tmp_path) == []
