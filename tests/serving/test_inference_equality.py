"""What Triton's own client gets from ``anchorline serve`` is what ``Detector`` gives, to the bit."""

from __future__ import annotations

import json
import threading

import cv2
import numpy as np
import onnx
import pytest
import tritonclient.http as tritonclient

from anchorline.data.synthetic import generate_scene
from anchorline.runtime import Detector
from anchorline.serving.inference_server import InferenceServer
from anchorline.serving.serve_options import ServeOptions
from anchorline.train.checkpoint import contract_of

NAMES = ("cat", "dog", "größer")
SIZES = ((120, 160), (90, 160), (160, 120), (333, 250), (120, 160))
COLUMNS = {"boxes": 4, "scores": 1, "labels": 1}
CPU = ServeOptions(provider="cpu")


@pytest.fixture(scope="module")
def model(small_model, onnx_of, tmp_path_factory):
    """A file of the real architecture, for frames of any size."""
    path = tmp_path_factory.mktemp("served") / "small.onnx"
    built = small_model("fpn", len(NAMES))
    onnx.save(onnx_of(built, contract_of(built.settings, NAMES)), path)
    return path


@pytest.fixture(scope="module")
def frames():
    return [generate_scene(3, size, number)[0] for number, size in enumerate(SIZES)]


@pytest.fixture(scope="module")
def expected(model, frames):
    with Detector(model, "cpu") as detector:
        found = [detector(frame) for frame in frames]
    assert min(map(len, found)) > 10
    return found


@pytest.fixture
def server(model):
    with InferenceServer({"small": model}, CPU) as running:
        yield running


@pytest.fixture
def client(server):
    with tritonclient.InferenceServerClient(str(server.address)) as opened:
        yield opened


def asked(name, value, *, binary=True):
    if name == "encoded":
        value = np.array([value], object)
    tensor = tritonclient.InferInput(name, list(value.shape), "BYTES" if name == "encoded" else "UINT8")
    return [tensor.set_data_from_numpy(value, binary_data=binary)]


def check_equal(answer, expected):
    for name in ("boxes", "scores", "labels"):
        ours, theirs = getattr(expected, name), answer.as_numpy(name)
        assert theirs.dtype == ours.dtype
        assert theirs.shape == ours.shape
        assert theirs.tobytes() == ours.tobytes()
    names = [each.decode() if isinstance(each, bytes) else each for each in answer.as_numpy("names").tolist()]
    assert names == expected.names


@pytest.mark.parametrize("outputs", ["all in binary", "all in JSON", "mixed"])
@pytest.mark.parametrize("binary", [True, False])
def test_pixels(client, frames, expected, binary, outputs):
    wanted = None
    if outputs != "all in binary":
        wanted = [
            tritonclient.InferRequestedOutput(name, binary_data=outputs == "mixed" and number % 2 == 0)
            for number, name in enumerate(("names", "labels", "scores", "boxes"))
        ]
    for frame, found in zip(frames, expected, strict=True):
        answer = client.infer("small", asked("image", frame, binary=binary), outputs=wanted, request_id="7")
        check_equal(answer, found)
        assert answer.get_response()["id"] == "7"
        assert answer.get_response()["model_name"] == "small"


def test_a_frame_without_detections(client):
    black = np.zeros((120, 160, 3), np.uint8)
    nothing = client.infer("small", asked("image", black), parameters={"min_score": 1})
    assert nothing.as_numpy("boxes").shape == (0, 4)
    assert nothing.as_numpy("names").shape == (0,)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_encoded_pictures(client, model, frames, suffix):
    encoded = [cv2.imencode(suffix, frame)[1].tobytes() for frame in frames]
    with Detector(model, "cpu") as detector:
        for content in encoded:
            read = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
            check_equal(client.infer("small", asked("encoded", content)), detector(read))


def test_detect_answers_the_line_of_the_command(server, model, frames, tmp_path, ask):
    from anchorline import cli

    for number, frame in enumerate(frames):
        path = tmp_path / f"{number}.png"
        cv2.imwrite(str(path), frame)
        lines = tmp_path / f"{number}.jsonl"
        filters = ["--min-score", "0.2", "--classes", "cat,dog", "--max-detections", "9"]
        command = ["detect", str(path), "--model", str(model), "--provider", "cpu", "--jsonl", str(lines)]
        assert cli.main([*command, *filters]) == 0
        query = f"?source={path}&min_score=0.2&classes=cat,dog&max_detections=9"
        code, headers, body = ask(server, f"/detect{query}", path.read_bytes())
        assert code == 200
        assert headers["content-type"] == "application/json"
        assert body.decode() + "\n" == lines.read_text(encoding="utf-8")
        assert 0 < len(json.loads(body)["detections"]) <= 9


def test_joined_frames_have_the_results_that_they_have_alone(model, frames, expected, check_same_rows):
    """But for the order of sums, which no library promises to be the same in every batch."""
    options = ServeOptions(provider="cpu", max_wait=0.5, batch=4)
    answers: dict[int, object] = {}
    with InferenceServer({"small": model}, options) as server:

        def call(number):
            with tritonclient.InferenceServerClient(str(server.address)) as client:
                answers[number] = client.infer("small", asked("image", frames[number % len(frames)]))

        callers = [threading.Thread(target=call, args=(number,)) for number in range(20)]
        for each in callers:
            each.start()
        for each in callers:
            each.join()
        sizes = server.models["small"].batcher.figures.frames_by_batch
    assert max(sizes) > 1
    assert sum(size * count for size, count in sizes.items()) == 20
    for number, answer in answers.items():
        alone = expected[number % len(frames)]
        found = [answer.as_numpy(name).reshape(-1, width) for name, width in COLUMNS.items()]
        wanted = [getattr(alone, name).reshape(-1, width) for name, width in COLUMNS.items()]
        check_same_rows(np.hstack(found), np.hstack(wanted), 0.01, 1e-5)
