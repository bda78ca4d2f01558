"""Models behind an address: the server around the pages, from opening the files to its graceful end."""

from __future__ import annotations

import contextlib
import html
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path
from types import FrameType

import numpy as np

from anchorline.runtime.backends.cpu_options import usable_cores
from anchorline.runtime.canvas import usual_canvas
from anchorline.runtime.io.errors import SettingsError, shown
from anchorline.serving.access import HEADERS, content_policy
from anchorline.serving.batching import BatchDetector, Batcher
from anchorline.serving.connections import Limits, Server
from anchorline.serving.inference_pages import InferenceGate, InferencePages, Model
from anchorline.serving.listening import Address, listen
from anchorline.serving.serve_options import ServeOptions

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,99}", re.ASCII)
_MOST_DECODERS = 4  # threads
_CONNECTIONS = 1024
_LEAVE_SECONDS = 5.0  # beside those that a request may take


class InferenceServer:
    """Serves ``models`` over HTTP: the Open Inference Protocol, and pictures in, JSON out (docs/serving.md).

    >>> with InferenceServer({"street": "model.onnx"}, port=8000) as server:
    ...     print(server.url)

    ``models`` are files, or detectors that are open already and stay so, by their names. The port is taken at
    once (0 is any free one), then the files are opened and run once; requests are answered inside the
    ``with`` block, in a thread, or in ``run``, until a signal. ``token`` is what callers have to show,
    ``names`` are host names of this machine beside its own. ``warnings`` are lines for whoever starts it.
    Raises ``SettingsError``, and what ``Detector`` does.
    """

    def __init__(
        self,
        models: Mapping[str, str | Path | BatchDetector],
        options: ServeOptions | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        token: str | None = None,
        names: Iterable[str] = (),
    ) -> None:
        self.options = options = options or ServeOptions()
        if not models:
            raise SettingsError("there is no model to serve; name at least one")
        for name in models:
            if not _NAME.fullmatch(name):
                raise SettingsError(
                    f"the model's name is {shown(name)}; expected letters, digits, _, . and -, up to 100; "
                    "give one as NAME=FILE"
                )
        with contextlib.ExitStack() as stack:
            self.models: dict[str, Model] = {}
            openapi = files("anchorline.serving").joinpath("openapi.json").read_text(encoding="utf-8")
            page = reference_page(openapi)
            threads = ThreadPoolExecutor(
                min(_MOST_DECODERS, usable_cores()), thread_name_prefix="anchorline decoder"
            )
            pages = InferencePages(self.models, options, threads, page, openapi)
            gate = InferenceGate(pages, token, names)
            self._socket = stack.enter_context(contextlib.closing(listen(Address(host, port))))
            self.address = Address(*self._socket.getsockname()[:2])
            for name, model in models.items():
                self.models[name] = self._open(name, model, stack)
            stack.callback(threads.shutdown)
            self._opened = stack.pop_all()
        self.url = self.address.url
        self.warnings: list[str] = []
        if token is None and not self.address.is_loopback:
            self.warnings.append(
                f"the server at {self.address} has no token: whoever reaches it on the network may use it; "
                "set ANCHORLINE_SERVE_TOKEN, or serve at 127.0.0.1"
            )
        longest = options.body_seconds + options.deadline + _LEAVE_SECONDS
        limits = Limits(connections=_CONNECTIONS, strangers=_CONNECTIONS, idle_seconds=longest)
        headers = {**HEADERS, "content-security-policy": content_policy(page)}
        self._server = Server(gate, headers, limits, leave_seconds=longest)
        self._thread = threading.Thread(target=self._serve, name="anchorline inference server", daemon=True)
        self._error: BaseException | None = None

    def _open(self, name: str, model: str | Path | BatchDetector, stack: contextlib.ExitStack) -> Model:
        options = self.options
        detector: BatchDetector
        if isinstance(model, str | Path):
            detector = stack.enter_context(options.open_detector(model))
        else:
            detector = model
        most = min(options.batch, detector.contract.max_batch or options.batch)
        if detector is not model:  # ready means that it runs, a single frame and a batch
            black = np.zeros((*usual_canvas(detector.contract), 3), np.uint8)
            for count in sorted({1, min(2, most)}):
                detector.batch([black] * count)
        workers = getattr(detector, "concurrent_calls", 1)
        batcher = Batcher(detector, most=most, max_wait=options.max_wait, room=options.queue, workers=workers)
        stack.callback(batcher.close)
        return Model(name, batcher)

    def run(self) -> None:
        """Answer requests until SIGTERM or Ctrl-C, and then finish those that are there."""
        with self._opened, _on_signal(self.stop):
            self._server.run([self._socket])

    def stop(self) -> None:
        """End ``run`` as a signal does; from any thread."""
        self._server.should_exit = True

    def __enter__(self) -> InferenceServer:
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise SettingsError(f"nothing can be served ({self._error}); see the packages' versions")
            time.sleep(0.01)
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
        self._thread.join()

    def _serve(self) -> None:
        try:
            self.run()
        except BaseException as error:  # SystemExit included, which is uvicorn's way to fail
            self._error = error


@contextlib.contextmanager
def _on_signal(stop: Callable[[], None]) -> Iterator[None]:
    """SIGTERM is the usual end: uvicorn raises it again when it is done, which would be death.

    Ctrl-C ends it as well, also before uvicorn listens to signals, and is ``KeyboardInterrupt`` behind all.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupted = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted |= number == signal.SIGINT
        stop()

    heeded = [each for each in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(each) != signal.SIG_IGN]
    before = {each: signal.signal(each, handle) for each in heeded}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    if interrupted:
        raise KeyboardInterrupt


def parse_models(texts: Sequence[str]) -> dict[str, str]:
    """``["street.onnx", "night=other.onnx"]`` as files by name; a file without one has its own, to the dot.

    Raises ``SettingsError`` for a name that stands twice.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or os.path.exists(text) or not _NAME.fullmatch(name):
            name, path = Path(text).stem, text
        if name in found:
            raise SettingsError(
                f"two models are called {shown(name)}: {found[name]} and {path}; name one as NAME=FILE"
            )
        found[name] = path
    return found


def reference_page(openapi: str) -> str:
    """The paths of the description as a page of HTML, which asks nothing of any other server."""
    described = json.loads(openapi)
    rows = [
        f"<h2><b>{method.upper()}</b> {html.escape(path)}</h2><p>{html.escape(each['summary'])}</p>"
        f"<p>{html.escape(each.get('description', ''))}</p>"
        for path, methods in described["paths"].items()
        for method, each in methods.items()
        if method in ("get", "post")
    ]
    about = described["info"]
    template = files("anchorline.serving").joinpath("reference.html").read_text(encoding="utf-8")
    filled = template.replace("{title}", html.escape(about["title"]))
    return filled.replace("{about}", html.escape(about["description"])).replace("{paths}", "\n".join(rows))
