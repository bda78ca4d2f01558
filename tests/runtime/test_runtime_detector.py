from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import json
import multiprocessing
import pickle
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
from PIL import Image

from anchorline.runtime import VideoPipeline, VideoReader, VideoWriter, read_image
from anchorline.runtime.backends.onnxruntime import OnnxRuntimeBackend
from anchorline.runtime.canvas import Preprocessor, to_detections
from anchorline.runtime.contract import Thresholds
from anchorline.runtime.detector import Detector
from anchorline.runtime.io.errors import (
    AnchorlineError,
    ArtefactError,
    DataError,
    FrameError,
    OutputError,
    SettingsError,
)
from anchorline.runtime.tensorrt.cuda import CudaError, OutOfDeviceMemoryError

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def detector(model_path):
    with Detector(model_path, threads=1) as opened:
        yield opened


def grey(height: int, width: int, level: int) -> np.ndarray:
    return np.full((height, width, 3), level, np.uint8)


def test_one_frame(detector):
    found = detector(grey(96, 100, 102))
    np.testing.assert_allclose(found.boxes, [[0, 0, 100, 96], [0, 0, 50, 48]], rtol=1e-6)
    np.testing.assert_allclose(found.scores, [0.4, 0.2], rtol=1e-6)
    assert found.names == ["whole", "quarter"]
    assert (found.size, found.category_ids) == ((96, 100), (7, 9))


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (32, 32), (3000, 4000), (47, 65)])
def test_frames_of_any_size(detector, size):
    found = detector(grey(*size, 204))
    np.testing.assert_allclose(found.boxes[0], [0, 0, size[1], size[0]], rtol=1e-6)
    np.testing.assert_allclose(found.scores[0], 0.8, rtol=1e-6)


@pytest.mark.parametrize("max_batch", [None, 1, 3])
def test_a_batch_of_mixed_sizes_is_each_frame_alone(tmp_path, write_model, contract, max_batch):
    path = write_model(tmp_path / "a.onnx", dataclasses.replace(contract, max_batch=max_batch))
    rng = np.random.default_rng(0)
    sizes = [(48, 64), (10, 200), (200, 10), (1, 1), (60, 80), (48, 64), (7, 9)]
    frames = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    with Detector(path, threads=1) as detector:
        together = detector.batch(frames)
        alone = [detector(frame) for frame in frames]
        assert detector.batch([]) == []
    for batched, single, size in zip(together, alone, sizes, strict=True):
        np.testing.assert_allclose(batched.boxes, single.boxes, rtol=1e-6)
        np.testing.assert_allclose(batched.scores, single.scores, rtol=1e-6)
        assert batched.size == size


def test_max_batch_bounds_what_the_network_sees(tmp_path, write_model, contract, monkeypatch):
    path = write_model(tmp_path / "a.onnx", dataclasses.replace(contract, max_batch=3))
    seen = []
    infer = OnnxRuntimeBackend.infer

    def counted(self, inputs):
        seen.append(len(inputs["images"]))
        return infer(self, inputs)

    monkeypatch.setattr(OnnxRuntimeBackend, "infer", counted)
    with Detector(path) as detector:
        assert len(detector.batch([grey(5, 5, 9)] * 7)) == 7
    assert seen == [3, 3, 1]


def test_a_result_outlives_the_next_call(detector):
    first = detector(grey(48, 64, 102))
    detector(grey(48, 64, 255))
    np.testing.assert_allclose(first.scores, [0.4, 0.2], rtol=1e-6)


def test_the_float_input(tmp_path, write_model, contract):
    path = write_model(tmp_path / "a.onnx", dataclasses.replace(contract, input_dtype="float32"))
    with Detector(path) as detector:
        np.testing.assert_allclose(detector(grey(96, 100, 102)).scores, [0.4, 0.2], rtol=1e-5)


def test_score_threshold(model_path):
    with Detector(model_path, score_threshold=0.2) as detector:
        assert detector(grey(48, 64, 102)).names == ["whole", "quarter"]  # 0.4 and, exactly, 0.2
        assert detector(grey(48, 64, 100)).names == ["whole"]
        assert len(detector(grey(48, 64, 0))) == 0


@pytest.mark.parametrize("threshold", [-0.1, 1.5, float("nan"), "high", True])
def test_an_absurd_threshold_is_refused(model_path, threshold):
    with pytest.raises(SettingsError, match="expected a number from 0 to 1"):
        Detector(model_path, score_threshold=threshold)


def test_a_threshold_below_the_graphs_own_is_refused(model_path):
    with pytest.raises(SettingsError, match=r"score_threshold is 0\.01, .* already drops scores up to 0\.05"):
        Detector(model_path, score_threshold=0.01)


def test_what_it_says_of_itself(model_path, contract):
    with Detector(model_path) as detector:
        assert detector.contract == contract
        assert (detector.provider, detector.precision) == ("cpu", "fp32")


def test_timings_of_the_last_call(detector):
    detector(grey(480, 640, 9))
    assert list(detector.timings) == ["preprocess", "upload", "network", "download", "postprocess"]
    assert detector.timings["upload"] == detector.timings["download"] == 0
    assert all(detector.timings[stage] > 0 for stage in ("preprocess", "network", "postprocess"))


def test_each_thread_has_the_timings_of_its_own_call(detector):
    detector(grey(480, 640, 9))
    own, others = detector.timings, []

    def call() -> None:
        others.append(detector.timings)  # none of its own yet: the last of any thread's
        detector(grey(480, 640, 9))
        others.append(detector.timings)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert others[0] is own
    assert others[1] is not own
    assert detector.timings is own


def test_a_processor_without_openvino_takes_one_call_at_a_time(model_path):
    for tuning in ("latency", "throughput"):
        with Detector(model_path, "cpu", tuning=tuning) as detector:
            assert detector.concurrent_calls == 1


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (None, "got None; an image or video that could not be read"),
        ([[1, 2, 3]], "got a list; convert it with numpy.asarray"),
        (np.zeros((4, 4)), r"got float64 \[4, 4\]; convert grey with cv2"),
        (np.zeros((4, 4), np.uint8), r"got uint8 \[4, 4\]; convert grey with cv2"),
        (np.zeros((4, 4, 1), np.uint8), "convert grey with cv2"),
        (np.zeros((4, 4, 4), np.uint8), r"got uint8 \[4, 4, 4\]; drop the alpha channel"),
        (np.zeros((4, 4, 2), np.uint8), r"got uint8 \[4, 4, 2\]; give one frame, channels last"),
        (np.zeros((3, 4, 4), np.float32), r"got float32 \[3, 4, 4\]"),
        (np.zeros((1, 4, 4, 3), np.uint8), "several go to batch"),
        (np.zeros((4, 4, 3), np.float32), r"got float32 \[4, 4, 3\]; scale it to 0..255"),
        (np.zeros((4, 4, 3), np.uint16), r"got uint16"),
        (np.zeros((4, 4, 3), bool), r"got bool"),
        (np.zeros((0, 4, 3), np.uint8), r"got uint8 \[0, 4, 3\]; the frame has no pixels"),
        (np.zeros((4, 0, 3), np.uint8), "no pixels"),
        (np.zeros(0, np.uint8), "give one frame"),
        ("a.jpg", r"got a str; read it first, with read_image"),
        (Image.new("L", (4, 4)), r"got a Image; .* numpy.asarray\(image.convert\('RGB'\)\)\[:, :, ::-1\]"),
    ],
)
def test_what_is_no_frame_is_refused(detector, frame, message):
    with pytest.raises(
        FrameError, match=rf"Expected a frame as uint8 BGR array of shape \[H, W, 3\], .*{message}"
    ):
        detector(frame)


def test_a_bad_frame_of_a_batch_is_named(detector):
    with pytest.raises(FrameError, match=r"frame 1 of the batch: Expected .* got None"):
        detector.batch([grey(4, 4, 0), None])


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (None, "Expected several frames, got a NoneType; give a list"),
        (grey(4, 4, 0), r"Expected several frames, got a single one; give \[frame\]"),
        (["a.jpg"], "got a str; read it first"),
    ],
)
def test_what_is_no_row_of_frames_is_refused(detector, frames, message):
    with pytest.raises(FrameError, match=message):
        detector.batch(frames)
    with pytest.raises(FrameError, match=message):
        list(detector.stream(frames))


def test_a_batch_may_come_from_any_iterable(detector):
    frames = [grey(8, 8, 40), grey(9, 7, 200)]
    expected = [detector(frame).scores.tolist() for frame in frames]
    for given in (iter(frames), tuple(frames), deque(frames)):
        assert [found.scores.tolist() for found in detector.batch(given)] == expected


@pytest.mark.parametrize("model", [b"content", None, 3, "", "a\0b", "\udc00", io.BytesIO(b"content")])
def test_what_is_no_path_is_refused_in_one_line(model):
    for read, kind in ((Detector, ArtefactError), (read_image, DataError), (VideoReader, DataError)):
        with pytest.raises(kind, match=r"expected the path of a file|no file can be called so") as caught:
            read(model)
        assert "\n" not in str(caught.value)


def test_pickled_and_copied_it_is_its_arguments(tmp_path, model_path, monkeypatch):
    path = tmp_path / "model.onnx"
    path.write_bytes(model_path.read_bytes())
    monkeypatch.chdir(tmp_path)
    frame = grey(20, 30, 200)
    with Detector("model.onnx", "cpu", 0.5, threads=1) as detector:
        expected = detector(frame).scores
        content = pickle.dumps(detector)
        monkeypatch.chdir("/")
        for again in (pickle.loads(content), copy.copy(detector), copy.deepcopy(detector)):
            with again:
                np.testing.assert_array_equal(again(frame).scores, expected)
                assert again.score_threshold == 0.5
            np.testing.assert_array_equal(detector(frame).scores, expected)  # which is open still
    path.unlink()
    with pytest.raises(ArtefactError, match=r"model\.onnx: no such file"):
        pickle.loads(content)


def test_another_process_opens_it_for_itself(model_path):
    with Detector(model_path, "cpu", threads=1) as detector:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            found = pool.submit(detector.batch, [grey(20, 30, 200)]).result(timeout=300)
        np.testing.assert_array_equal(found[0].scores, detector(grey(20, 30, 200)).scores)


@pytest.mark.parametrize("change", [copy.copy, copy.deepcopy, pickle.dumps])
def test_readers_writers_and_pipelines_are_neither_pickled_nor_copied(
    change, detector, tmp_path, video_frames, write_raw_video
):
    path = write_raw_video(tmp_path / "a.mp4", video_frames)
    with VideoReader(path) as reader, VideoWriter(tmp_path / "b.mp4", (48, 64), 10) as writer:
        writer.write(video_frames[0])
        for each in (reader, writer, VideoPipeline(detector, [path])):
            with pytest.raises(SettingsError, match=f"a {type(each).__name__} cannot be pickled or copied"):
                change(each)


@pytest.mark.parametrize(
    "error",
    [
        FrameError("a frame"),
        OutputError("a: cannot be written"),
        CudaError("running a", "CUDA_ERROR_ILLEGAL_ADDRESS", "why"),
        OutOfDeviceMemoryError(2**30, 2**20, "loading a", "lower the batch"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_cross_processes_whole(error):
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, []), "the detector is None"),
        (("clip.mp4",), r"a single one; expected several: \[source\]"),
        (([None],), "a source is None"),
        (([True],), "a source is True"),
        (([""],), "a source is ''"),
        ((["a\0b"],), "no file can be called so"),
        ((None, [[]]), "the detector is None"),
        (([[]], "fast"), "options are 'fast'"),
    ],
)
def test_pipelines_that_cannot_be(detector, arguments, message):
    with pytest.raises(AnchorlineError, match=message):
        VideoPipeline(*(arguments if None in arguments else (detector, *arguments)))


class LongName:
    def __repr__(self) -> str:
        return "a\n" * 1000


@pytest.mark.parametrize(
    "settings",
    [
        {"workers": 10**400},
        {"workers": LongName()},
        {"threads": 100_000},
        {"provider": np.array([1, 2])},
        {"cpu_precision": np.array([1, 2])},
        {"gpu": LongName()},
        {"score_threshold": LongName()},
    ],
)
def test_settings_that_cannot_be_are_one_short_line(settings, model_path):
    """A number beyond all threads hung, or was said to be damage of the model."""
    with pytest.raises(SettingsError) as caught:
        Detector(model_path, **{"provider": "cpu", **settings})
    assert str(caught.value).startswith(f"{next(iter(settings))} is ")
    assert len(str(caught.value)) < 250
    assert "\n" not in str(caught.value)


def test_frames_of_any_memory_layout(detector, picture):
    read_only = np.frombuffer(picture.tobytes(), np.uint8).reshape(picture.shape)
    for view in (
        read_only,
        picture[:, ::-1],
        picture[..., ::-1],
        picture[5:30, 7:50],
        np.asfortranarray(picture),
    ):
        np.testing.assert_array_equal(detector(view).scores, detector(np.array(view, order="C")).scores)


@pytest.mark.parametrize(
    ("model", "remedy"), [("a.engine", "needs its manifest"), ("a.safetensors", "anchorline export")]
)
def test_other_artefacts_name_the_way(tmp_path, model, remedy):
    with pytest.raises(ArtefactError, match=remedy):
        Detector(tmp_path / model)


@pytest.mark.parametrize("provider", ["tensorrt", "CPU", "", None])
def test_an_unknown_provider_lists_what_there_is(model_path, provider):
    with pytest.raises(SettingsError, match="available here: auto, cpu"):
        Detector(model_path, provider=provider)
    with pytest.raises(SettingsError, match="cpu"):
        OnnxRuntimeBackend(model_path, provider)


@pytest.mark.parametrize("threads", [0, -1, 1.5, "two"])
def test_absurd_threads_are_refused(model_path, threads):
    with pytest.raises(SettingsError, match="whole number of at least 1"):
        Detector(model_path, threads=threads)


def test_a_closed_detector_says_so(model_path):
    detector = Detector(model_path)
    detector.close()
    detector.close()
    with pytest.raises(SettingsError, match="closed"):
        detector(grey(4, 4, 4))


def test_proposals_have_one_class(tmp_path, write_model, contract):
    path = write_model(
        tmp_path / "a.onnx",
        dataclasses.replace(contract, task="proposals", outputs=("boxes", "scores", "num_detections")),
    )
    with Detector(path, score_threshold=0.01) as detector:  # proposals are not cut by score in the graph
        found = detector(grey(48, 64, 102))
    assert found.names == ["object", "object"]
    assert found.category_ids is None
    assert found.to_coco(1)[0]["category_id"] == 1


def test_the_backend_by_itself(model_path):
    with contextlib.closing(OnnxRuntimeBackend(model_path, threads=1)) as backend:
        images = np.full((2, 48, 64, 3), 51, np.uint8)
        outputs, _ = backend.infer({"images": images, "image_sizes": np.array([[48, 64]] * 2, np.float32)})
        assert set(outputs) == {"boxes", "scores", "labels", "num_detections"}
        np.testing.assert_allclose(outputs["scores"][:, 0], 0.2, rtol=1e-6)
        with pytest.raises(ArtefactError, match="onnxruntime cannot run it"):
            backend.infer({"images": images[:, :5], "image_sizes": np.zeros((2, 2), np.float32)})


# Files that are no model of ours


def refuse(path, message, capfd):
    with pytest.raises(ArtefactError, match=message) as caught:
        Detector(path)
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_missing_empty_and_folder(tmp_path, capfd):
    (tmp_path / "empty.onnx").touch()
    refuse(tmp_path / "none.onnx", "no such file", capfd)
    refuse(tmp_path / "empty.onnx", "empty", capfd)
    refuse(tmp_path, "is a folder", capfd)


@pytest.mark.parametrize("content", [b"hello world" * 9, b"\x00" * 100, b"PK\x03\x04 a zip", b"\x08\x0a"])
def test_a_file_of_another_kind(tmp_path, content, capfd):
    path = tmp_path / "a.onnx"
    path.write_bytes(content)
    refuse(path, "not an ONNX file|cannot load it", capfd)


def test_every_cut_is_refused(tmp_path, model_path, capfd):
    content = model_path.read_bytes()
    path = tmp_path / "cut.onnx"
    for end in range(1, len(content) - 1, 37):
        path.write_bytes(content[:end])
        refuse(path, "not an ONNX file|cannot load it|no anchorline contract|contract", capfd)


def test_an_onnx_file_of_another_program(tmp_path, write_model, capfd):
    refuse(
        write_model(tmp_path / "a.onnx", None), "has no anchorline contract; export it with anchorline", capfd
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "contract is not JSON"),
        ("[]", "expected a JSON object"),
        ("{}", "contract version is missing"),
        ('{"version": 1}', "damaged contract"),
        ('{"version": 999}', "newer than 2.*upgrade anchorline"),
    ],
)
def test_a_damaged_or_newer_contract(tmp_path, write_model, text, message, capfd):
    refuse(write_model(tmp_path / "a.onnx", text), message, capfd)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"inputs": ["pictures", "image_sizes"]},
            "graph inputs are images, image_sizes; its contract expects pictures",
        ),
        ({"inputs": ["images"]}, "contract inputs is .*expected two tensor names"),
        ({"outputs": ["boxes", "scores", "labels", "count"]}, "graph outputs are .* expects .*count"),
        ({"outputs": ["boxes", "scores", "labels"]}, "expected 4 for the task detections"),
        ({"canvas": [48, 65]}, r"expects uint8 \[B, 48, 65, 3\]"),
        ({"input_dtype": "float32"}, "input images is uint8"),
    ],
)
def test_a_contract_at_odds_with_its_graph(tmp_path, write_model, contract, changed, message, capfd):
    text = json.dumps({**json.loads(contract.to_json()), **changed})
    refuse(write_model(tmp_path / "a.onnx", text), message, capfd)


# The steps around the network


def test_the_preprocessor_reuses_its_batch(contract, picture):
    preprocess = Preprocessor(contract)
    inputs, placements = preprocess([picture, picture[:30]])
    images, sizes = inputs.values()
    again = preprocess([picture[:30]])[0]["images"]
    assert np.shares_memory(images, again)
    assert sizes.tolist() == [list(p.valid) for p in placements] == [[48, 64], [24, 64]]
    assert not again[0, 24:].any()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"labels": np.array([[5, 0, 0]])}, "labels below 2"),
        ({"boxes": np.full((1, 3, 4), np.nan, np.float32)}, "finite boxes"),
    ],
)
def test_outputs_that_break_the_contract(contract, picture, damage, message):
    _, placements = Preprocessor(contract)([picture])
    outputs = {
        "boxes": np.zeros((1, 3, 4), np.float32),
        "scores": np.ones((1, 3), np.float32),
        "labels": np.zeros((1, 3), np.int32),
        "num_detections": np.array([2], np.int32),
        **damage,
    }
    with pytest.raises(ArtefactError, match=f"does not fit its contract: .*{message}"):
        to_detections(outputs, placements, contract)


def test_thresholds_default_keeps_everything_the_graph_gives(model_path, contract):
    assert contract.thresholds == Thresholds(score=0.05)
    with Detector(model_path) as detector:
        assert len(detector(grey(48, 64, 0))) == 2  # two filled slots, both with score 0
