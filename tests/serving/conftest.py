"""A run in a browser's reach: a camera that can stall, a detector that can fail, a client on real sockets."""

from __future__ import annotations

import contextlib
import http.client
import json
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from anchorline.runtime.contract import CONTRACT_KEY, Contract, ResizeRule
from anchorline.runtime.detections import Detections
from anchorline.runtime.video.frames import Result, Stream
from anchorline.runtime.video.options import DetectOptions
from anchorline.runtime.video.pipeline import VideoPipeline
from anchorline.runtime.video.source import Source
from anchorline.serving import painting
from anchorline.serving.inference_server import InferenceServer
from anchorline.serving.live_view import LiveView
from anchorline.serving.serve_options import ServeOptions

HEIGHT, WIDTH = 120, 160
NAMES = ("cat", "dog")
CAT, DOG = (20, 30, 60, 70), (90, 40, 140, 100)
SECONDS = 60.0  # that anything may take on a busy machine


class Finder:
    """Finds a cat (0.9) and a dog (0.6) in every frame; waits where ``blocked`` is set, or fails."""

    provider, precision = "stub", "none"

    def __init__(self) -> None:
        self.fails = False
        self.free = threading.Event()
        self.free.set()

    def batch(self, frames: Sequence[np.ndarray]) -> list[Detections]:
        self.free.wait()
        if self.fails:
            raise RuntimeError("the detector fails")
        return [Detections([CAT, DOG], [0.9, 0.6], [0, 1], class_names=("cat", "dog")) for _ in frames]


class Camera:
    """Frames with a bar that moves, a hundred a second, until ``ended``; none while it is not ``playing``."""

    def __init__(self, pause: float = 0.01) -> None:
        self.pause = pause
        self.playing, self.ended = threading.Event(), threading.Event()
        self.playing.set()

    def __iter__(self) -> Iterator[np.ndarray]:
        count = 0
        while not self.ended.is_set():
            if not self.playing.wait(0.05):
                continue
            frame = np.full((HEIGHT, WIDTH, 3), 40, np.uint8)
            frame[105:, count % WIDTH :] = 250
            count += 1
            yield frame
            time.sleep(self.pause)


class Run:
    """A pipeline in a thread, seen through a live view; ``error`` is what it raised."""

    def __init__(self, cameras: Sequence[str] = ("cam1",), *, begins: bool = True, **options: Any) -> None:
        serving = {key: options.pop(key) for key in ("token", "names", "limits") if key in options}
        self.finder, self.cameras = Finder(), {name: Camera() for name in cameras}
        self.view = LiveView(options.pop("where", 0), **serving)
        sources = [Source(iter(camera), name=name, live=True) for name, camera in self.cameras.items()]
        sinks = [self.view, *options.pop("sinks", ())]
        self.pipeline = VideoPipeline(self.finder, sources, DetectOptions(**options), sinks=sinks)
        self.begins = begins
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._work)
        self.port = self.view.address.port
        self.live = self.view._live

    def _work(self) -> None:
        try:
            self.pipeline.run()
        except Exception as error:
            self.error = error

    def begin(self) -> None:
        """The pipeline starts; before that its model may be loading."""
        self.view.watch(self.pipeline)
        self.thread.start()
        while self.thread.is_alive() and not self.pipeline.figures.anything_came():
            time.sleep(0.01)

    def __enter__(self) -> Run:
        self.view.__enter__()
        if self.begins:
            self.begin()
        return self

    def __exit__(self, *error: object) -> None:
        self.finder.free.set()
        for camera in self.cameras.values():
            camera.ended.set()
        self.pipeline.stop()
        if self.thread.ident is not None:
            self.thread.join(SECONDS)
        self.view.__exit__(None, None, None)
        assert not self.thread.is_alive()

    def ask(
        self, path: str, method: str = "GET", body: object = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers (lower case) and body; header names with ``_`` for ``-``."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
            sent = {"Content-Type": "application/json", **sent}
        with contextlib.closing(connection):
            connection.request(method, path, body, sent)
            answer = connection.getresponse()
            found = {name.lower(): value for name, value in answer.getheaders()}
            return answer.status, found, answer.read()

    def status(self) -> dict[str, Any]:
        return json.loads(self.ask("/status")[2])

    def health(self) -> tuple[int, dict[str, str]]:
        code, _, body = self.ask("/healthz")
        return code, json.loads(body)["problems"]

    @contextlib.contextmanager
    def opened(self, path: str, **headers: str) -> Iterator[http.client.HTTPResponse]:
        """An answer that is not read yet."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        with contextlib.closing(connection):
            connection.request("GET", path, headers=headers)
            answer = connection.getresponse()
            assert answer.status == 200
            with contextlib.closing(answer):
                yield answer


def pictures(answer: http.client.HTTPResponse) -> Iterator[np.ndarray]:
    """The decoded pictures of a multipart stream."""
    while answer.readline() != b"":
        head = http.client.parse_headers(answer)
        jpeg = answer.read(int(head["Content-Length"]))
        answer.readline()
        decoded = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)
        assert decoded is not None
        yield decoded


def records(answer: http.client.HTTPResponse) -> Iterator[tuple[int, bytes]]:
    """The records of the page's feed: place and content."""
    while len(head := answer.read(8)) == 8:
        place, length = struct.unpack(">II", head)
        yield place, answer.read(length)


class Scripted:
    """Finds a cat as large as the frame and a dog in a quarter of it; the cat's score is its first pixel.

    It waits where ``free`` is not set, and keeps the sizes of the frames of each batch. A frame whose first
    pixel is in ``poison`` raises what stands there.
    """

    provider, precision = "scripted", "none"

    def __init__(self, canvas: tuple[int, int] | None = None, max_batch: int | None = None) -> None:
        self.contract = Contract(
            "detections",
            NAMES,
            canvas,
            (0.0, 0.0, 0.0),
            (1.0, 1.0, 1.0),
            resize=ResizeRule(padding=32),
            max_batch=max_batch,
        )
        self.timings = {"network": 0.001}
        self.batches: list[list[tuple[int, int]]] = []
        self.poison: dict[int, Exception] = {}
        self.free, self.entered = threading.Event(), threading.Event()
        self.free.set()

    def batch(self, frames: Sequence[np.ndarray]) -> list[Detections]:
        self.batches.append([frame.shape[:2] for frame in frames])
        self.entered.set()
        assert self.free.wait(60)
        for frame in frames:
            if (error := self.poison.get(int(frame[0, 0, 0]))) is not None:
                raise error
        return list(map(self.found, frames))

    def found(self, frame: np.ndarray) -> Detections:
        height, width = frame.shape[:2]
        boxes = [[0, 0, width, height], [0, 0, width / 2, height / 2]]
        scores = [int(frame[0, 0, 0]) / 255, 0.3]
        return Detections(boxes, scores, [0, 1], class_names=NAMES, size=(height, width))


@pytest.fixture(scope="session", autouse=True)
def many_cores() -> Iterator[None]:
    """The share of one core would be a few pictures a second, and a long wait for them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(painting, "_SHARE", 1.0)
        yield


@pytest.fixture(scope="session")
def one_box_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that finds one box in every frame, a frame at a time."""
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper

    contract = Contract("detections", ("thing",), (48, 64), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), max_batch=1)
    values = {
        "boxes": np.array([[[4, 4, 40, 30]]], np.float32),
        "scores": np.array([[0.9]], np.float32),
        "labels": np.array([[0]], np.int32),
        "num_detections": np.array([1], np.int32),
    }
    nodes = [
        helper.make_node("Constant", [], [name], value=onnx.numpy_helper.from_array(value))
        for name, value in values.items()
    ]
    inputs = [
        helper.make_tensor_value_info("images", TensorProto.UINT8, [1, 48, 64, 3]),
        helper.make_tensor_value_info("image_sizes", TensorProto.FLOAT, [1, 2]),
    ]
    outputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in values.items()
    ]
    graph = helper.make_graph(nodes, "one", inputs, outputs)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    helper.set_model_props(made, {CONTRACT_KEY: contract.to_json()})
    path = tmp_path_factory.mktemp("serve") / "one.onnx"
    onnx.save(made, path)
    return path


@pytest.fixture(scope="session")
def live_run() -> type[Run]:
    return Run


@pytest.fixture
def run() -> Iterator[Run]:
    """One camera, named cam1, that everybody may watch."""
    with Run() as running:
        yield running


@pytest.fixture(scope="module")
def common_run() -> Iterator[Run]:
    """The same for all tests of a file that leave it as it is."""
    with Run() as running:
        yield running


@pytest.fixture(scope="session")
def read_pictures() -> Callable[..., Iterator[np.ndarray]]:
    return pictures


@pytest.fixture(scope="session")
def read_records() -> Callable[..., Iterator[tuple[int, bytes]]]:
    return records


@pytest.fixture(scope="session")
def until() -> Callable[..., None]:
    """``until(condition, seconds)``: wait for it, or fail."""

    def wait(condition: Callable[[], object], seconds: float = SECONDS) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not come about in time"
            time.sleep(0.02)

    return wait


@pytest.fixture(scope="session")
def grey_result() -> Callable[..., Result]:
    """``grey_result(source, size, level)``: a result with a cat and a dog."""

    def make(source: str, size: tuple[int, int] = (HEIGHT, WIDTH), level: int = 40) -> Result:
        frame = np.full((*size, 3), level, np.uint8)
        return Result(frame, Finder().batch([frame])[0], Stream(source, source, size, 25.0), 0, 0.0, 0.0)

    return make


@pytest.fixture(scope="session")
def is_drawn() -> Callable[[np.ndarray, str], bool]:
    """``is_drawn(picture, "cat")``: whether that box is drawn, by its left edge below the label."""

    def drawn(picture: np.ndarray, name: str) -> bool:
        x1, _, _, y2 = {"cat": CAT, "dog": DOG}[name]
        edge = picture[y2 - 12 : y2 - 4, x1 - 1 : x1 + 3].astype(int)
        return bool(np.abs(edge - 40).max() > 60)

    return drawn


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """Every test leaves no thread behind."""
    before = _own_threads()
    yield
    end = time.monotonic() + SECONDS
    while (left := _own_threads() - before) and time.monotonic() < end:
        time.sleep(0.02)
    assert not left


def _own_threads() -> set[threading.Thread]:
    return {each for each in threading.enumerate() if each.name.startswith("anchorline ")}


@pytest.fixture(scope="session")
def ask() -> Callable[..., tuple[int, dict[str, str], bytes]]:
    """``ask(server, path, body, method, headers)``: status, headers (lower case) and body."""

    def asked(
        server: InferenceServer,
        path: str,
        body: bytes | None = None,
        method: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", server.address.port, timeout=SECONDS)
        with contextlib.closing(connection):
            connection.request(method or ("GET" if body is None else "POST"), path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, {key.lower(): value for key, value in answer.getheaders()}, answer.read()

    return asked


@pytest.fixture(scope="session")
def scripted() -> type[Scripted]:
    return Scripted


@pytest.fixture(scope="session")
def serving() -> Callable[..., InferenceServer]:
    """``serving(detector, token=..., **options)``: a server of one model called ``model``, or of several."""

    def served(detector: Any, token: str | None = None, names: Sequence[str] = (), **options: Any) -> Any:
        models = detector if isinstance(detector, dict) else {"model": detector}
        return InferenceServer(models, ServeOptions(**options), token=token, names=names)

    return served


@pytest.fixture(scope="session")
def png() -> Callable[..., bytes]:
    """``png(level, height, width)``: a grey picture."""

    def encoded(level: int, height: int = 24, width: int = 32) -> bytes:
        return cv2.imencode(".png", np.full((height, width, 3), level, np.uint8))[1].tobytes()

    return encoded
