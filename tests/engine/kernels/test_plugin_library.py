"""The plugin library in C++, taken through a plugin's life over a driver that computes on the CPU.

``plugin_driver.cpp`` plays TensorRT and ``driver_double.cpp`` the CUDA driver, which runs the kernels' own
source. TensorRT for RTX itself builds with the library. Where NVIDIA's headers are at hand, ours is compared
with them and the player of TensorRT built with them: ``$ANCHORLINE_TENSORRT_INCLUDE`` holds TensorRT's folder
and CUDA's, parted by a colon.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from numpy.typing import NDArray

from anchorline import cli
from anchorline.engine.plugin_library import SOURCES, build_plugin_library
from anchorline.runtime.io.errors import AnchorlineError, SettingsError
from anchorline.runtime.tensorrt import plugins
from anchorline.runtime.tensorrt.kernels import FOLDER, image

HERE = Path(__file__).resolve().parent
Once = Callable[[str, Callable[[Path], None]], Path]
NMS = {"iou_threshold": 0.5, "score_threshold": 0.05}
STRICT = "g++ -Wall -Wextra -Werror"

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("g++") is None, reason="needs Linux and g++ to build the library"
)


def headers() -> list[str]:
    """Options that find NVIDIA's headers; none where there are none."""
    folders = os.environ.get("ANCHORLINE_TENSORRT_INCLUDE", "")
    warnings = ["-Wno-deprecated-declarations", "-Wno-unused-parameter"]
    return ["-DNVIDIA_HEADERS", *warnings, *(f"-I{each}" for each in folders.split(":"))] if folders else []


def compile_cpp(source: str, out: Path, *options: str) -> None:
    command = [*STRICT.split(), "-std=c++17", "-O1", *options, str(HERE / source), "-ldl", "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[:3000]


@pytest.fixture(scope="module")
def library(once: Once) -> Path:
    """Made by the command."""
    name = "libanchorline_plugins.so"

    def make(folder: Path) -> None:
        assert cli.main(["plugin-library", "--out", str(folder / name), "--compiler", STRICT]) == 0

    return once("plugins", make) / name


@pytest.fixture(scope="module")
def double(once: Once) -> Path:
    """The folder of a libcuda.so.1."""
    options = ("-O2", "-ffp-contract=off", "-fPIC", "-shared", "-Wl,-soname,libcuda.so.1", f"-I{FOLDER}")
    return once("libcuda", lambda folder: compile_cpp("driver_double.cpp", folder / "libcuda.so.1", *options))


@pytest.fixture(scope="module")
def driver(once: Once) -> Path:
    """Built with NVIDIA's headers where there are some."""

    def make(folder: Path) -> None:
        compile_cpp("plugin_driver.cpp", folder / "plugin_driver", *(headers() or [f"-I{SOURCES}"]))

    return once("plugin_driver", make) / "plugin_driver"


@dataclass
class Driven:
    """What a plugin answered, what the driver was asked for, and the result."""

    answers: dict[str, str]
    calls: list[str]
    errors: str
    folder: Path

    def output(self, kind: type) -> NDArray[Any]:
        assert "done" in self.answers, (self.answers, self.errors)
        shape = [int(side) for side in self.answers["output"].split()]
        return np.fromfile(self.folder / "output", kind).reshape(shape)


@pytest.fixture
def drive(driver: Path, library: Path, double: Path, tmp_path: Path) -> Callable[..., Driven]:
    """``drive(op, attributes, *inputs, capability=86, fails="", libcuda=double)``."""

    def run(
        op: str,
        attributes: dict[str, float],
        *inputs: NDArray[Any],
        capability: int = 86,
        fails: str = "",
        libcuda: Path | None = double,
    ) -> Driven:
        for place, values in enumerate(inputs):
            values.tofile(tmp_path / str(place))
        (tmp_path / "calls").unlink(missing_ok=True)
        environment = dict(os.environ)
        if libcuda:
            environment |= {
                "LD_LIBRARY_PATH": str(libcuda),
                "DOUBLE_FOLDER": str(tmp_path),
                "DOUBLE_CAPABILITY": str(capability),
                "DOUBLE_FAILS": fails,
            }
        done = subprocess.run(
            [driver, library, tmp_path, op]
            + [f"{name}={value}" for name, value in attributes.items()]
            + [f"{','.join(map(str, values.shape))}:{values.dtype.name}" for values in inputs],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode in (0, 1), done
        answers = dict((*line.split(" ", 1), "")[:2] for line in done.stdout.splitlines())
        calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
        return Driven(answers, calls, done.stderr, tmp_path)

    return run


def launched(found: Driven) -> list[str]:
    return [line.removeprefix("cuLaunchKernel ") for line in found.calls if line.startswith("cuLaunchKernel")]


@pytest.mark.parametrize(
    ("kind", "groups", "count"),
    [
        ("clustered", 3, 200),
        ("holes", 2, 256),
        ("tied overlaps", 2, 257),
        ("holes", 3, 700),
        ("random", 1, 1),
    ],
)
def test_nms_is_the_definition_to_the_bit(
    kind: str,
    groups: int,
    count: int,
    drive: Callable[..., Driven],
    make_groups: Callable,
    greedy_nms: Callable,
) -> None:
    boxes, scores = make_groups(kind, groups, count, np.random.default_rng(count))
    found = drive("BatchedNMS", NMS, boxes, scores)
    assert found.answers["plugin"] == "anchorline BatchedNMS 1"
    np.testing.assert_array_equal(found.output(np.float32), greedy_nms(boxes, scores, 0.5, 0.05))


@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_roi_pool_is_torchvision_s(kind: type, drive: Callable[..., Driven]) -> None:
    features = np.random.default_rng(0).normal(0, 1, (2, 5, 12, 17)).astype(kind)
    corner = np.random.default_rng(1).uniform(-10, 200, (2, 9, 2))
    rois = np.concatenate([corner, corner + np.random.default_rng(2).uniform(0, 150, (2, 9, 2))], axis=2)
    rois = rois.astype(np.float32)
    found = drive("RoIPool", {"output_size": 7, "spatial_scale": 0.0625}, features, rois)
    expected = torchvision.ops.roi_pool(
        torch.from_numpy(features.astype(np.float32)), list(torch.from_numpy(rois)), 7, 0.0625
    )
    np.testing.assert_array_equal(found.output(kind), expected.numpy().astype(kind))
    assert found.answers["supports"] == "1 1 0 1 0 0 1 0 0"  # features of either kind, all else of its own


@pytest.mark.parametrize("count", [1, 64, 256, 257, 1000])
def test_it_launches_what_the_python_plugin_launches(
    count: int, drive: Callable[..., Driven], make_groups: Callable
) -> None:
    boxes, scores = make_groups("random", 2, count, np.random.default_rng(0))
    found = drive("BatchedNMS", NMS, boxes, scores)
    op = plugins.BatchedNMS(**NMS)
    call = plugins.Call((boxes.shape, scores.shape), ("float32", "float32"), (1, 2), 3, 4)
    expected = [" ".join(map(str, (each.kernel, *each.grid, each.threads))) for each in op.launches(call)]
    assert launched(found) == expected
    assert int(found.answers["workspace"]) == op.workspace_bytes(call.shapes)
    words = [f"{name}:1:{np.float32(value).view(np.int32)}" for name, value in NMS.items()]  # 1 is float32
    assert found.answers["serialised"] == " ".join(words)


@pytest.mark.parametrize("capability", [75, 86, 90, 121, 130])
def test_each_gpu_gets_its_own_image_and_a_later_one_ptx(
    capability: int, drive: Callable[..., Driven], make_groups: Callable
) -> None:
    found = drive(
        "BatchedNMS", NMS, *make_groups("random", 1, 5, np.random.default_rng(0)), capability=capability
    )
    assert "done" in found.answers
    assert (found.folder / "image.0").read_bytes().rstrip(b"\0") == image("nms", capability).rstrip(b"\0")
    # Loaded and looked up before the first launch, which allocates nothing then.
    assert [line.split()[0] for line in found.calls if "cuCtxGetDevice" not in line] == [
        "cuLibraryLoadData",
        *["cuLibraryGetKernel", "cuKernelGetFunction"] * 3,
        "cuLaunchKernel",
    ]


@pytest.mark.parametrize(
    ("fails", "told", "reason"),
    [
        ("cuLaunchKernel", "enqueue", "launching nms_small failed: CUDA_ERROR_LAUNCH_FAILED (719)"),
        ("cuKernelGetFunction", "attachToContext", "loading nms_overlaps failed"),
        ("cuLibraryGetKernel", "attachToContext", "finding nms_overlaps failed"),
        ("cuLibraryLoadData", "attachToContext", "loading the kernels of nms failed"),
        ("cuCtxGetDevice", "attachToContext", "finding the current GPU failed"),
    ],
)
def test_a_driver_that_fails_is_a_failure_with_its_reason(
    fails: str, told: str, reason: str, drive: Callable[..., Driven], make_groups: Callable
) -> None:
    found = drive("BatchedNMS", NMS, *make_groups("random", 1, 5, np.random.default_rng(0)), fails=fails)
    assert (found.answers, "done" in found.answers) == ({**found.answers, "failed": told}, False)
    assert reason in found.errors


@pytest.mark.parametrize(
    ("op", "attributes", "reason"),
    [
        ("BatchedNMS", {"iou_threshold": 1.5, "score_threshold": 0}, "iou_threshold is 1.5; expected 0 to 1"),
        ("BatchedNMS", {"iou_threshold": "nan", "score_threshold": 0}, "iou_threshold is nan"),
        ("BatchedNMS", {"iou": 0.5, "score_threshold": 0}, "node node has no attribute iou_threshold"),
        ("RoIPool", {"output_size": 0, "spatial_scale": 1}, "output_size is 0 and spatial_scale 1"),
    ],
)
def test_attributes_that_cannot_be_are_refused(
    op: str, attributes: dict[str, float], reason: str, drive: Callable[..., Driven], make_groups: Callable
) -> None:
    found = drive(op, attributes, *make_groups("random", 1, 5, np.random.default_rng(0)))
    assert found.answers == {"failed": "createPlugin"}
    assert reason in found.errors


def test_inputs_of_the_wrong_shape_and_too_many_boxes_are_refused(drive: Callable[..., Driven]) -> None:
    found = drive("BatchedNMS", NMS, np.zeros((5, 4), np.float32), np.zeros((1, 5), np.float32))
    assert found.answers["failed"] == "getOutputShapes"
    found = drive("BatchedNMS", NMS, np.zeros((1, 8193, 4), np.float32), np.zeros((1, 8193), np.float32))
    assert found.answers["failed"] == "configurePlugin"
    assert "1 groups of 8193 boxes; the plugin takes at most 65535 of 8192" in found.errors
    assert launched(found) == []


def test_no_boxes_are_no_work(drive: Callable[..., Driven]) -> None:
    found = drive("BatchedNMS", NMS, np.zeros((2, 0, 4), np.float32), np.zeros((2, 0), np.float32))
    assert (found.output(np.float32).shape, launched(found)) == ((2, 0), [])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("count", [200, 1000])
def test_on_a_gpu_nms_is_the_definition(
    count: int, drive: Callable[..., Driven], make_groups: Callable, greedy_nms: Callable
) -> None:
    """The same library and the same calls, with the machine's own driver."""
    boxes, scores = make_groups("holes", 4, count, np.random.default_rng(count))
    found = drive("BatchedNMS", NMS, boxes, scores, libcuda=None)
    np.testing.assert_array_equal(found.output(np.float32), greedy_nms(boxes, scores, 0.5, 0.05))


def test_the_interface_is_laid_out_as_nvidia_s(tmp_path: Path) -> None:
    """Places in tables of virtual functions and in structs, enumerators, names and versions of interfaces."""
    if not headers():
        pytest.skip("needs NVIDIA's headers: ANCHORLINE_TENSORRT_INCLUDE=TENSORRT/include:CUDA/include")
    told = {}
    for name, more in (("ours", [f"-I{SOURCES}"]), ("theirs", headers())):
        compile_cpp("interface_layout.cpp", tmp_path / name, "-Wno-invalid-offsetof", *more)
        told[name] = subprocess.run([tmp_path / name], capture_output=True, text=True, check=True)
    assert told["ours"].stdout == told["theirs"].stdout
    assert len(told["ours"].stdout.splitlines()) > 80
    (major, place), source = re.findall(r"\d+", told["theirs"].stderr), (SOURCES / "plugins.cpp").read_text()
    assert f'{{"libnvinfer.so.{major}", {place}}}' in source  # where registerCreator stands


def test_what_is_exported_and_what_is_needed(library: Path) -> None:
    """Neither TensorRT nor CUDA is linked, and no C++ runtime that another machine may have older."""
    needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    names = re.findall(r"\(NEEDED\).*\[(.*)\]", needed)
    assert {name.split(".so")[0] for name in names} <= {
        "libc",
        "libm",
        "libdl",
        "ld-linux-x86-64",
        "ld-linux-aarch64",
    }
    assert "NODELETE" in needed
    exported = subprocess.run(
        ["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True
    )
    assert re.findall(r" T (\S+)", exported.stdout) == ["getCreators", "setLoggerFinder"]


def test_nothing_is_destroyed_when_the_process_ends(tmp_path: Path) -> None:
    """A program's own objects may hold engines, and go last."""
    (tmp_path / "images.inc").write_text("")
    command = ["g++", "-std=c++17", "-O1", "-fPIC", f"-I{tmp_path}", "-c", str(SOURCES / "plugins.cpp")]
    subprocess.run([*command, "-o", tmp_path / "plugins.o"], check=True, timeout=120)
    wanted = subprocess.run(["nm", "-u", tmp_path / "plugins.o"], capture_output=True, text=True, check=True)
    assert "dlsym" in wanted.stdout
    assert "__cxa_atexit" not in wanted.stdout


ON_RTX = f"""
import sys
sys.path.insert(0, {str(HERE.parent / "builder")!r})
from test_plugins_in_networks import NMS, POOL, engine, network_of
from anchorline.runtime.tensorrt.library import load_tensorrt
library, folder = sys.argv[1:]
if library:
    engine.register_plugins = lambda trt: None  # nothing of Python's
    load_tensorrt("tensorrt-rtx").get_plugin_registry().load_library(library)
for name, text in (("nms", NMS), ("pool", POOL.replace("KIND", "float16"))):
    for batch in ((2, 2, 2), (1, 2, 8)):
        toolkit, builder, network, options = network_of(text, batch)
        plan = engine.serialise(toolkit, builder, network, options, batch)
        print(name, batch, len(plan.content), plan.activation_bytes, plan.warnings)
        if batch == (2, 2, 2):
            open(f"{{folder}}/{{name}}", "wb").write(plan.content)
"""


def test_tensorrt_for_rtx_builds_the_same_engine_with_it(
    rtx: Any, library: Path, cache: Path, tmp_path: Path
) -> None:
    """NVIDIA's own code asks the library for types, shapes, formats, memory and what to keep.

    Nothing differs from the plugin in Python: an engine built with either finds what it needs in the other.
    Free sides have numbers in the plan, given in no fixed order, so bytes are compared where none is free.
    """
    told = []
    for name in ("", str(library)):
        folder = tmp_path / ("library" if name else "python")
        folder.mkdir()
        done = subprocess.run(
            [sys.executable, "-c", ON_RTX, name, folder],
            env={**os.environ, "XDG_CACHE_HOME": str(cache)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
        told.append(done.stdout)
    assert told[0] == told[1]
    assert re.search(r"nms \(1, 2, 8\) \d+ \(61440,\) \(\)", told[0])  # 8 groups of 15 tiles
    for name in ("nms", "pool"):
        engines = [(tmp_path / each / name).read_bytes() for each in ("python", "library")]
        assert engines[0] == engines[1]
        assert b"anchorline" in engines[0]


def test_registering_on_load(tmp_path: Path) -> None:
    """As Triton loads it: opened, no more, beside a TensorRT that not all libraries can see; or beside two,
    where onnxruntime brings an older one."""
    versions = []
    for number, place in ((10, 12), (11, 8)):
        versions.append(tmp_path / f"libnvinfer.so.{number}")
        options = ["-shared", "-fPIC", f"-DPLACE={place}", f"-DVERSION={number}"]
        named = [f"-Wl,-soname,{versions[-1].name}", "-o", str(versions[-1])]
        source = ["g++", "-x", "c", str(HERE / "registry_double.c")]
        subprocess.run([*source, *options, *named], check=True, timeout=120)
    library = build_plugin_library(tmp_path / "libplugins.so", compiler=STRICT, register_on_load=True)
    code = "import ctypes, sys; print(*(bool(ctypes.CDLL(name)) for name in sys.argv[1:]))"
    for there in ([], versions[:1], versions[1:], versions):
        done = subprocess.run(
            [sys.executable, "-c", code, *there, library], capture_output=True, text=True, timeout=60
        )
        told = [f"registered in anchorline by {one.name.split('.')[-1]}" for one in there for _ in range(2)]
        assert done.stdout.splitlines() == [*told, " ".join(["True"] * (len(there) + 1))], done.stderr
        assert ("TensorRT 10 or 11 is not loaded" in done.stderr) == (not there)


def test_mistakes_are_one_line_and_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        SettingsError, match=r"output is '.*plugins.dll'; expected a file name that ends in .so"
    ):
        build_plugin_library(tmp_path / "plugins.dll")
    with pytest.raises(
        SettingsError, match="C\\+\\+ compiler is 'no-such-compiler', and there is no such program"
    ):
        build_plugin_library(tmp_path / "plugins.so")
    with pytest.raises(AnchorlineError, match=r"g\+\+ could not compile the plugin library: .*error"):
        build_plugin_library(tmp_path / "plugins.so", compiler="g++ -fno-such")
    with pytest.raises(SettingsError, match=r"C\+\+ compiler is 'g\+\+ \"-I', and .*quotation"):
        build_plugin_library(tmp_path / "plugins.so", compiler='g++ "-I')
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        SettingsError, match=r"no C\+\+ compiler found \(c\+\+, g\+\+, clang\+\+\); install one"
    ):
        build_plugin_library(tmp_path / "plugins.so")
    assert list(tmp_path.iterdir()) == []


def test_a_compiler_is_run_where_it_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program or an option of it may be a path from here."""
    compiler = tmp_path / "tools" / "c++"
    compiler.parent.mkdir()
    compiler.write_text('#!/bin/sh\necho "error: $LC_ALL $PWD $1 \\0303" >&2; exit 1\n')
    compiler.chmod(0o755)
    linker = tmp_path / "tools" / "linker"
    linker.write_text(
        "#!/bin/sh\necho 'ld: cannot find -lstdc++' >&2; echo 'collect2: error: 1 exit status' >&2; exit 1\n"
    )
    linker.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AnchorlineError, match=r"the plugin library: ld: cannot find -lstdc\+\+"):
        build_plugin_library("plugins.so", compiler="tools/linker")
    with pytest.raises(AnchorlineError, match=rf"compile the plugin library: error: C {tmp_path} -Iheaders"):
        build_plugin_library("plugins.so", compiler="tools/c++ -Iheaders")
    assert [each.name for each in tmp_path.iterdir()] == ["tools"]
