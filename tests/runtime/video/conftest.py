"""A detector of fixed cost, a camera on loopback, and the watch over threads that stay behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import cv2
import numpy as np
import pytest

from anchorline.runtime.detections import Detections


class StubDetector:
    """Finds one box in every frame, whose score is the frame's first byte over 255, after ``cost`` seconds.

    ``batches`` holds the number of frames of each call, ``fail_at`` the call (from 0) that raises.
    """

    provider, precision = "stub", "none"

    def __init__(self, cost: float = 0.0, fail_at: int | None = None, concurrent_calls: int = 1) -> None:
        self.cost, self.fail_at, self.concurrent_calls = cost, fail_at, concurrent_calls
        self.batches: list[int] = []

    def batch(self, frames: Sequence[np.ndarray]) -> list[Detections]:
        self.batches.append(len(frames))
        if len(self.batches) - 1 == self.fail_at:
            raise RuntimeError("the stub fails")
        time.sleep(self.cost)
        return [
            Detections([[1, 2, 30, 20]], [int(frame.flat[0]) / 255], [0], class_names=("thing",))
            for frame in frames
        ]


@pytest.fixture(scope="session")
def stub() -> type[StubDetector]:
    return StubDetector


@pytest.fixture(scope="session")
def grey() -> Callable[[int], np.ndarray]:
    """``grey(index)``: a small frame of that grey level."""
    return lambda index: np.full((48, 64, 3), index % 256, np.uint8)


def pipeline_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("anchorline ")]


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    """Every test leaves no thread of the pipeline behind."""
    yield
    until = time.monotonic() + 60.0
    while pipeline_threads() and time.monotonic() < until:
        time.sleep(0.02)
    assert pipeline_threads() == []


class MjpegServer:
    """Frames of one grey level each at ``fps``, for every client that asks, whatever the path.

    ``size`` is (height, width). Setting ``mode`` lets a connection do something once: ``"die"`` closes
    it; ``"stall"`` keeps it open and sends nothing more; ``"garbage"`` sends noise and closes it;
    ``"damage"`` sends three pictures that cannot be decoded and goes on. The next one plays again.
    ``port`` stays the same over ``down`` and ``up``. A context manager.
    """

    def __init__(self, size: tuple[int, int] = (48, 64), fps: float = 50.0) -> None:
        self.size, self.fps, self.mode = size, fps, "play"
        self.connections = 0
        self.sent = 0
        self.port = 0
        self._closing = threading.Event()
        self._server: ThreadingHTTPServer | None = None
        self.up()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/live"

    def up(self) -> None:
        """Listen, at the port of before where there was one."""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *arguments: object) -> None:
                pass

            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
                self.end_headers()
                outer._serve(self)

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            allow_reuse_address = True
            block_on_close = False  # a client that has gone is no reason to wait

            def handle_error(self, request: object, address: object) -> None:
                pass  # a client that leaves is no error

        self._closing.clear()
        self._server = Server(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def down(self) -> None:
        """Refuse connections and end those that there are."""
        self._closing.set()
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        self.connections += 1
        closing = self._closing
        while not closing.is_set():
            mode, self.mode = self.mode, "play"  # a fault is one connection's
            if mode == "die":
                return
            if mode == "garbage":
                handler.wfile.write(np.random.default_rng(0).integers(0, 256, 50_000, np.uint8).tobytes())
                return
            if mode == "stall":
                closing.wait(60.0)
                return
            for _ in range(3 if mode == "damage" else 0):
                handler.wfile.write(part(b"no picture"))
            handler.wfile.write(self._part())
            time.sleep(1.0 / self.fps)

    def _part(self) -> bytes:
        frame = np.full((*self.size, 3), self.sent % 256, np.uint8)
        self.sent += 1
        return part(cv2.imencode(".jpg", frame)[1].tobytes())

    def __enter__(self) -> MjpegServer:
        return self

    def __exit__(self, *error: object) -> None:
        self.down()


def part(picture: bytes) -> bytes:
    """One picture of the stream with its head."""
    head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(picture)}\r\n\r\n"
    return head.encode() + picture + b"\r\n"


@pytest.fixture
def camera() -> Iterator[MjpegServer]:
    with MjpegServer() as server:
        yield server


@pytest.fixture
def second_camera() -> Iterator[MjpegServer]:
    with MjpegServer() as server:
        yield server


@pytest.fixture(scope="session")
def until() -> Callable[..., None]:
    """``until(condition, seconds)``: wait for it, or fail."""

    def wait(condition: Callable[[], object], seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not come about in time"
            time.sleep(0.01)

    return wait
