"""OpenVINO as a provider: the detections of onnxruntime, bf16 where that is native, networks kept on disk."""

from __future__ import annotations

import dataclasses
import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from anchorline.runtime.backends import cpu_options
from anchorline.runtime.backends import onnxruntime as onnxruntime_backend
from anchorline.runtime.backends import openvino as openvino_backend
from anchorline.runtime.backends import selection as opening
from anchorline.runtime.backends.cpu_options import CpuOptions
from anchorline.runtime.backends.openvino import has_openvino, load_network, store_network
from anchorline.runtime.detector import Detector
from anchorline.runtime.io.errors import ArtefactError, FrameError, SettingsError
from anchorline.runtime.video.pipeline import VideoPipeline
from anchorline.runtime.video.source import Source

pytest.importorskip("onnxruntime")
needs_openvino = pytest.mark.skipif(not has_openvino(), reason="needs the package openvino")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
    """A cache of the test's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setattr(openvino_backend, "_said", set())
    monkeypatch.setattr(opening, "_said", set())
    return folder / "anchorline" / "networks"


def frames(count: int = 3) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (40 + 9 * i, 90 - 7 * i, 3), dtype=np.uint8) for i in range(count)]


@needs_openvino
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_the_detections_are_onnxruntime_s(tmp_path, write_model, contract, dtype):
    path = write_model(tmp_path / "a.onnx", dataclasses.replace(contract, input_dtype=dtype))
    with (
        Detector(path, "cpu", threads=1) as cpu,
        Detector(path, "openvino", threads=1, cpu_precision="fp32") as openvino,
    ):
        assert (openvino.provider, openvino.precision) == ("openvino", "fp32")
        together = openvino.batch(frames())
        for expected, found, alone in zip(
            cpu.batch(frames()), together, map(openvino, frames()), strict=True
        ):
            for each in (found, alone):
                np.testing.assert_allclose(each.boxes, expected.boxes, rtol=1e-5)
                np.testing.assert_allclose(each.scores, expected.scores, rtol=1e-5)
                np.testing.assert_array_equal(each.labels, expected.labels)
        assert set(openvino.timings) == {"preprocess", "upload", "network", "download", "postprocess"}
        assert openvino.timings["network"] > 0


@needs_openvino
def test_one_network_runs_every_frame_size(tmp_path, write_model, contract, cache):
    """A folder of mixed pictures compiles once, and once more for batches; padding moves no result of its
    neighbours."""
    path = write_model(tmp_path / "a.onnx", dataclasses.replace(contract, canvas=None))
    rng = np.random.default_rng(0)
    mixed = 2 * [rng.integers(0, 256, (*rng.integers(20, 200, 2), 3), dtype=np.uint8) for _ in range(12)]
    with (
        Detector(path, "cpu", threads=1) as cpu,
        Detector(path, "openvino", threads=1, cpu_precision="fp32") as openvino,
    ):
        for found, expected in zip(openvino.stream(mixed), map(cpu, mixed), strict=True):
            np.testing.assert_allclose(found.boxes, expected.boxes, rtol=1e-5)
            np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5)
        for found, expected in zip(openvino.batch(mixed[:5]), cpu.batch(mixed[:5]), strict=True):
            np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5)
    assert len(list(cache.iterdir())) == 2


@needs_openvino
def test_results_are_no_views_of_what_the_next_call_fills(model_path):
    with Detector(model_path, "openvino", threads=1) as detector:
        first = detector(np.full((48, 64, 3), 255, np.uint8))
        kept = first.scores.copy()
        detector(np.full((48, 64, 3), 51, np.uint8))
        np.testing.assert_array_equal(first.scores, kept)


@needs_openvino
def test_batches_of_one_have_a_network_of_their_own(model_path, cache):
    """The other is compiled when a larger batch comes, and both find the same."""
    with Detector(model_path, "openvino", cpu_precision="fp32") as detector:
        alone = [detector(frame) for frame in frames()]
        assert len([*cache.iterdir()]) == 1
        together = detector.batch(frames())
        again = detector(frames()[0])
        assert len([*cache.iterdir()]) == 2
        for one, other in zip([*together, again], [*alone, alone[0]], strict=True):
            np.testing.assert_allclose(one.boxes, other.boxes, atol=1e-3)
            np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)
            assert len(other) > 0


@needs_openvino
def test_a_stream_has_the_order_of_its_frames(model_path):
    grey = [np.full((48, 64, 3), level, np.uint8) for level in range(20, 250, 10)]
    with Detector(model_path, "openvino", threads=1, tuning="throughput") as detector:
        found = [each.scores[0] for each in detector.stream(grey, batch=2, in_flight=3)]
    np.testing.assert_allclose(found, [frame[0, 0, 0] / 255 for frame in grey], rtol=2e-2)


@needs_openvino
@pytest.mark.parametrize(("tuning", "calls"), [("latency", 1), ("throughput", 2)])
def test_throughput_wants_two_calls_at_once(model_path, tuning, calls):
    with Detector(model_path, "openvino", threads=2, tuning=tuning) as detector:
        assert detector.concurrent_calls == calls
        found = list(VideoPipeline(detector, [Source(list(np.full((3, 48, 64, 3), 51, np.uint8)))]))
    assert [result.index for result in found] == [0, 1, 2]


@needs_openvino
def test_auto_takes_openvino_and_checks_do_not(model_path):
    with Detector(model_path, threads=1) as detector:
        assert detector.provider == "openvino"
    assert opening.exact_provider("auto") == "cpu"
    assert opening.exact_provider("openvino") == "openvino"


@needs_openvino
@pytest.mark.parametrize("tuning", cpu_options.TUNINGS)
@pytest.mark.parametrize("asked", cpu_options.PRECISIONS)
def test_what_auto_measures_is_of_the_precision_that_was_asked_for(model_path, cache, asked, tuning):
    native = cpu_options.has_native_bf16()
    if asked == "bf16" and not native:
        pytest.skip("this processor does not compute bf16 natively")
    with Detector(model_path, measure=True, threads=1, cpu_precision=asked, tuning=tuning) as detector:
        assert len(detector(np.full((48, 64, 3), 255, np.uint8))) == 2
        found = detector.provider, detector.precision
    answers = cache.parent / "choices"
    if asked == "bf16":  # which onnxruntime does not compute in: nothing to choose
        assert found == ("openvino", "bf16")
        assert not answers.exists()
        return
    (kept,) = answers.iterdir()
    stated = json.loads(kept.read_text())
    ran = {figure["provider"]: figure["precision"] for figure in stated["figures"]}
    assert ran == {"cpu": "fp32", "openvino": "bf16" if asked == "auto" and native else "fp32"}
    assert found == (stated["provider"], ran[stated["provider"]])


@needs_openvino
def test_processes_that_open_a_model_at_once_measure_once_and_choose_alike(model_path):
    """As the workers of a service do, whose results should not differ."""
    code = (
        "import sys; from anchorline.runtime import Detector\n"
        f"with Detector({str(model_path)!r}, measure=True) as detector: print(detector.provider)"
    )
    command = [sys.executable, "-c", code]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(3)]
    said = [process.communicate(timeout=100) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], said
    assert len({out for out, _ in said}) == 1
    assert [err.count("measured once") for _, err in said].count(1) == 1


@needs_openvino
def test_what_openvino_cannot_compile_runs_on_the_cpu_and_that_is_said_once(model_path, monkeypatch, caplog):
    def fail(*arguments: object) -> None:
        raise RuntimeError("no conversion rule\nfor this")

    monkeypatch.setattr(openvino_backend, "core", lambda: FailingCore(fail))
    for measure in (False, False, True, True):
        with Detector(model_path, threads=1, measure=measure) as detector:
            assert detector.provider == "cpu"
    said = caplog.messages
    assert [message.count("no conversion rule for this") for message in said] == [1]
    with pytest.raises(ArtefactError, match=r"cannot compile it .*use the provider cpu"):
        Detector(model_path, "openvino")


class FailingCore:
    def __init__(self, fail):
        self.read_model = self.import_model = fail

    def get_property(self, *names: str) -> str:
        return "test"


@needs_openvino
def test_the_second_opening_comes_from_the_cache(model_path, cache, monkeypatch):
    Detector(model_path, "openvino", threads=1).close()
    assert len(list(cache.iterdir())) == 1

    def never(*arguments: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(openvino_backend, "_compile", never)
    with Detector(model_path, "openvino", threads=1) as detector:
        np.testing.assert_allclose(detector(np.full((48, 64, 3), 255, np.uint8)).scores, [1, 0.5], rtol=1e-2)
    with pytest.raises(AssertionError):  # other settings make another network
        Detector(model_path, "openvino", threads=2)


@needs_openvino
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_kept_network_computes_in_the_precision_that_was_asked_for(model_path, cache, precision):
    """OpenVINO's own file does not say it, and left alone takes bf16 where the processor has it."""
    if precision == "bf16" and not cpu_options.has_native_bf16():
        pytest.skip("this processor does not compute bf16 natively")
    for _ in range(2):
        with Detector(model_path, "openvino", threads=1, cpu_precision=precision) as detector:
            assert detector.precision == precision
    assert len(list(cache.iterdir())) == 1


@needs_openvino
@pytest.mark.parametrize("damage", ["cut", "flipped", "header", "empty", "folder"])
def test_a_damaged_entry_is_made_again_and_said_once(model_path, cache, caplog, damage):
    def opened() -> None:
        with Detector(model_path, "openvino", threads=1) as detector:
            assert len(detector(np.full((48, 64, 3), 255, np.uint8))) == 2

    opened()
    (entry,) = cache.iterdir()
    whole = entry.read_bytes()
    changed = {
        "cut": whole[:-100],
        "flipped": whole[:-100] + bytes([whole[-100] ^ 255]) + whole[-99:],
        "header": b"no json\n" + whole,
        "empty": b"",
    }
    if damage == "folder":
        entry.unlink()
        entry.mkdir()
    else:
        entry.write_bytes(changed[damage])
    with caplog.at_level(logging.WARNING):
        opened()
        opened()
    assert len([r for r in caplog.records if "made again" in r.message]) == 1
    if damage != "folder":
        assert load_network(entry) is not None


@needs_openvino
def test_a_cache_that_cannot_be_written_is_no_obstacle(model_path, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with Detector(model_path, "openvino", threads=1) as detector:
        assert len(detector(np.full((48, 64, 3), 255, np.uint8))) == 2


@needs_openvino
@pytest.mark.parametrize("native", [True, False])
def test_bf16_only_where_it_is_native(model_path, monkeypatch, native):
    if native and not cpu_options.has_native_bf16():
        pytest.skip("this processor does not compute bf16 natively")
    monkeypatch.setattr(cpu_options, "has_native_bf16", lambda: native)
    with Detector(model_path, "openvino", threads=1) as detector:
        assert detector.precision == ("bf16" if native else "fp32")
    if not native:
        with pytest.raises(SettingsError, match="no instructions for it"):
            Detector(model_path, "openvino", cpu_precision="bf16")


@needs_openvino
def test_roi_coordinates_stay_out_of_bf16(tmp_path):
    """What leads to an output of the graph OpenVINO leaves in fp32."""
    import onnx
    from onnx import TensorProto, helper

    def tensor(name: str, kind: int, shape: list[int]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    nodes = [
        helper.make_node("Add", ["boxes", "boxes"], ["rois"]),
        helper.make_node("RoiAlign", ["features", "rois", "images"], ["pooled"], output_height=2),
    ]
    inputs = [
        tensor("features", TensorProto.FLOAT, [1, 3, 8, 8]),
        tensor("boxes", TensorProto.FLOAT, [5, 4]),
        tensor("images", TensorProto.INT64, [5]),
    ]
    graph = helper.make_graph(nodes, "g", inputs, [tensor("pooled", TensorProto.FLOAT, [5, 3, 2, 1])])
    opsets = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "a.onnx")
    model = openvino_backend.core().read_model(str(tmp_path / "a.onnx"))
    openvino_backend._keep_coordinates(model)
    first, added = model.outputs
    assert "pooled" in first.names
    assert "rois" in added.names


@needs_openvino
@pytest.mark.parametrize(("slope", "fused"), [(1 / 6, True), (0.2, False)])
def test_hardswish_is_computed_in_its_convolution(tmp_path, contract, slope, fused):
    """onnxruntime writes its function out: x * HardSigmoid(x). Another slope is another function."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("HardSigmoid", ["c"], ["gate"], alpha=slope, beta=0.5),
        helper.make_node("Mul", ["gate", "c"], ["y"]),  # either order
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 16, 8, 8])],
        [numpy_helper.from_array(random.normal(size=(16, 3, 1, 1)).astype(np.float32), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, tmp_path / "a.onnx")
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    path = tmp_path / "a.onnx"
    network = openvino_backend._compile(path, path, settings, contract, alone=False)
    ops = {op.get_rt_info()["layerType"].astype(str) for op in network.get_runtime_model().get_ops()}
    assert ("Math" not in ops) == fused, ops
    x = random.normal(scale=4, size=(1, 3, 8, 8)).astype(np.float32)
    (expected,) = onnxruntime_backend.open_for_checks(model.SerializeToString()).run(None, {"x": x})
    found = network.create_infer_request().infer({"x": x})["y"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@needs_openvino
def test_an_int8_model_stays_what_it_is(tmp_path, write_model, contract):
    path = write_model(tmp_path / "a.onnx", dataclasses.replace(contract, precision="int8"))
    for _ in range(2):  # compiled, and from the cache
        with Detector(path, "openvino", threads=1) as detector:
            assert detector.precision == "int8"
    with pytest.raises(SettingsError, match="the model is int8"):
        Detector(path, "openvino", cpu_precision="bf16")


@needs_openvino
def test_bad_input(model_path, tmp_path):
    with pytest.raises(ArtefactError, match=r"no contract|not an ONNX file"):
        Detector(_file(tmp_path / "a.onnx", b"no onnx"), "openvino")
    with Detector(model_path, "openvino", threads=1) as detector:
        with pytest.raises(SettingsError, match="takes none"):
            detector(np.zeros((4, 4, 3), np.uint8), stream=1)
        with pytest.raises(FrameError):
            detector(np.zeros((4, 4), np.uint8))
        assert len(detector(np.full((4, 4, 3), 255, np.uint8))) == 2
    with pytest.raises(SettingsError, match="closed"):
        detector(np.zeros((4, 4, 3), np.uint8))


@needs_openvino
def test_importing_openvino_calls_nobody(model_path):
    """Its telemetry would report every import."""
    code = (
        "import sys\nfrom anchorline.runtime import Detector\n"
        f"Detector({str(model_path)!r}, 'openvino').close()\n"
        "print(any('openvino_telemetry' in name for name in sys.modules), 'openvino' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


@needs_openvino
def test_weights_that_need_vnni_are_left_to_onnxruntime_without_it(
    tmp_path, write_model, contract, monkeypatch, caplog
):
    """OpenVINO adds in 16 bits there, too, and cannot be told otherwise."""
    older = dataclasses.replace(contract, precision="int8", source={"quantised": {"for": "cpu"}})
    path = write_model(tmp_path / "older.onnx", older)
    for module in (openvino_backend, onnxruntime_backend):
        monkeypatch.setattr(module, "adds_in_16_bits", lambda: True)
    with pytest.raises(ArtefactError, match=r"need VNNI.*quantise the float model again, or use.*cpu"):
        Detector(path, "openvino")
    with Detector(path) as detector:
        assert (detector.provider, detector.precision) == ("cpu", "int8")
    assert "openvino cannot run it here" in caplog.text


@pytest.mark.parametrize(
    ("system", "machine", "flags", "adds"),
    [
        ("linux", "x86_64", "fpu avx2", True),
        ("linux", "x86_64", "fpu avx2 avx512f avx512bw", True),
        ("linux", "x86_64", "fpu avx2 avx_vnni", False),
        ("linux", "x86_64", "fpu avx512f avx512_vnni", False),
        ("linux", "aarch64", "asimd asimddp", False),
        ("win32", "AMD64", "", True),
        ("darwin", "arm64", "", False),
    ],
)
def test_processors_that_add_in_16_bits(tmp_path, monkeypatch, system, machine, flags, adds):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor : 0\nflags\t\t: {flags}\n")
    monkeypatch.setattr(cpu_options, "_CPUINFO", cpuinfo)
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(cpu_options.platform, "machine", lambda: machine)
    assert cpu_options.adds_in_16_bits() is adds


def test_by_name_and_not_installed(model_path, monkeypatch):
    monkeypatch.setattr(opening, "has_openvino", lambda: False)
    with pytest.raises(
        SettingsError, match=r"openvino.*pip install 'anchorline\[openvino\]'.*available here"
    ):
        Detector(model_path, provider="openvino")
    with Detector(model_path) as detector:
        assert detector.provider == "cpu"


def test_a_package_that_cannot_be_loaded_is_passed_over(model_path, monkeypatch, caplog):
    def load():
        raise ImportError("libopenvino.so: cannot open shared object file")

    monkeypatch.setattr("anchorline.runtime.backends.openvino.load_openvino", load)
    monkeypatch.setattr(opening, "has_openvino", lambda: True)
    with pytest.raises(ArtefactError, match=r"cannot be loaded here \(libopenvino\.so: cannot open"):
        Detector(model_path, "openvino")
    for measure in (False, True):
        with Detector(model_path, "auto", measure=measure) as detector:
            assert detector.provider == "cpu"
    assert "openvino cannot run it here" in caplog.text


def test_bf16_takes_openvino(model_path, monkeypatch):
    monkeypatch.setattr(opening, "has_openvino", lambda: False)
    for provider in ("auto", "cpu"):
        with pytest.raises(SettingsError, match=r"does not compute in bf16.*provider openvino"):
            Detector(model_path, provider, cpu_precision="bf16")


@pytest.mark.parametrize(
    ("name", "value"), [("cpu_precision", "fp16"), ("cpu_precision", None), ("tuning", "speed")]
)
def test_unknown_settings(model_path, name, value):
    with pytest.raises(SettingsError, match=f"{name} is {value!r}; expected one of"):
        Detector(model_path, **{name: value})


def test_cores_by_affinity_siblings_quota_and_openmp(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(cpu_options.os, "sched_getaffinity", lambda process: {0, 1, 2, 3}, raising=False)
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(cpu_options, "_CGROUP_QUOTA", quota)
    monkeypatch.setattr(cpu_options, "_siblings", str)
    assert cpu_options.usable_cores() == 4
    monkeypatch.setattr(cpu_options, "_siblings", lambda cpu: f"{cpu % 2},{cpu % 2 + 2}")
    assert cpu_options.usable_cores() == 2
    for text, cores in (("max 100000", 2), ("150000 100000", 1), ("50000 100000", 1), ("nonsense", 2)):
        quota.write_text(text)
        assert cpu_options.usable_cores() == cores
    for share, cores in (("1", 1), ("1,2", 1), ("8", 2), ("0", 2), ("", 2), ("many", 2)):
        monkeypatch.setenv("OMP_NUM_THREADS", share)
        assert cpu_options.usable_cores() == cores
    assert CpuOptions(threads=3).thread_count == 3


def test_the_cache_stays_within_its_limit(tmp_path, contract):
    paths = [tmp_path / "new" / f"{number}.network" for number in range(4)]
    for path in paths[:3]:
        store_network(path, bytes(5000), limit=20_000)
    for age, path in zip((30, 20, 10), paths[:3], strict=True):
        stamp = path.stat().st_mtime - age
        cpu_options.os.utime(path, (stamp, stamp))
    assert load_network(paths[0]) == bytes(5000)  # so it is the newest now
    store_network(paths[3], bytes(5000), limit=20_000)
    assert [path.is_file() for path in paths] == [True, False, True, True]
    store_network(paths[1], bytes(30_000), limit=20_000)  # larger than all together
    assert not paths[1].is_file()
    assert load_network(paths[1]) is None


def _file(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path
