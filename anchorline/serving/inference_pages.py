"""What each path of an inference server answers."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from anchorline import __version__
from anchorline.runtime.contract import Contract
from anchorline.runtime.detections import Detections
from anchorline.runtime.io.errors import DataError, FrameError, SettingsError, one_line, shown
from anchorline.runtime.io.files import json_text
from anchorline.runtime.io.image_bytes import PNG_SIGNATURE, read_header
from anchorline.runtime.io.images import decode_image
from anchorline.runtime.video.options import Filters
from anchorline.runtime.video.sinks import record_of
from anchorline.serving import inference_protocol as protocol
from anchorline.serving.access import GRANTED, HEALTH, Gate, is_of_own_page
from anchorline.serving.batching import Batcher, QueueFull
from anchorline.serving.connections import KEPT
from anchorline.serving.inference_metrics import Answers, ServerCollector
from anchorline.serving.intake import Refusal, Room, Share, busy, read_body, while_there
from anchorline.serving.metrics import metrics_answer
from anchorline.serving.serve_options import ServeOptions

_log = logging.getLogger("anchorline.serving")
_LIVE, _READY = "/v2/health/live", "/v2/health/ready"
_GONE = 499  # in the metrics only: who left is answered nothing
_IMAGE_STARTS = (b"\xff\xd8", PNG_SIGNATURE)
_LONGEST_TEXT = 1000  # characters of a source's name
# JSON numbers become Python's, which take more room than their digits.
_JSON_GROWS = 4


class InferenceGate(Gate):
    """A ``Gate`` that answers in JSON; probes of health need no token."""

    no_token = "this server needs its token; send the header 'Authorization: Bearer ...'"
    wrong_host = (
        "this server is not known by that name; use an IP address or localhost, or start it with --name NAME"
    )
    open_paths = frozenset({HEALTH, _LIVE, _READY})

    def refused(self, why: str, code: int, headers: dict[str, str] | None = None) -> Response:
        """The answer to who may not come in."""
        return JSONResponse({"error": why}, code, headers)


@dataclass(eq=False)
class Model:
    """A model that is served."""

    name: str
    batcher: Batcher
    answers: Answers = field(default_factory=Answers)

    @property
    def contract(self) -> Contract:
        """The detector's."""
        return self.batcher.detector.contract

    def metadata(self) -> dict[str, Any]:
        """What the protocol says of a model; properties have to be texts, so class names are JSON in one."""
        detector = self.batcher.detector
        provider = str(getattr(detector, "provider", "unknown"))
        return {
            "name": self.name,
            "versions": [protocol.VERSION],
            "platform": "tensorrt_plan" if provider.startswith("tensorrt") else "onnx_onnxv1",
            "inputs": protocol.INPUTS,
            "outputs": protocol.OUTPUTS,
            "properties": {
                "task": self.contract.task,
                "class_names": json_text(list(self.contract.names)),
                "provider": provider,
                "precision": str(getattr(detector, "precision", "unknown")),
            },
        }


@dataclass(frozen=True, eq=False)
class _Asked:
    """What a caller wants to know: of which frame, what of it, how soon, and how the answer is written."""

    frame: NDArray[np.uint8]
    filters: Filters
    timeout: float | None
    write: Callable[[Detections], Response]


class InferencePages:
    """The application: answers requests with the ``models``, each by its name.

    What is wrong with a request is answered with a code from 400 to 499 and ``{"error": ...}`` in one line.
    """

    def __init__(
        self,
        models: Mapping[str, Model],
        options: ServeOptions,
        threads: ThreadPoolExecutor,
        html: str,
        openapi: str,
    ) -> None:
        self._models, self._options, self._threads = models, options, threads
        self._html, self._openapi = html, openapi
        self._room = Room(options.memory_bytes)
        model = "/v2/models/{name}"
        versioned = model + "/versions/{version}"
        self._router = Router(
            [
                Route("/", self._page),
                Route("/docs", self._page),
                Route("/openapi.json", self._description),
                Route("/metrics", self._metrics),
                Route(HEALTH, self._ready),
                Route("/v2", self._server),
                Route("/v2/", self._server),
                Route(_LIVE, self._live),
                Route(_READY, self._ready),
                Route("/v2/repository/index", self._index, methods=["POST"]),
                *(Route(path, self._metadata) for path in (model, versioned)),
                *(Route(f"{path}/ready", self._model_ready) for path in (model, versioned)),
                *(Route(f"{path}/infer", self._infer, methods=["POST"]) for path in (model, versioned)),
                Route("/detect", self._detect, methods=["POST"]),
                Route("/detect/{name}", self._detect, methods=["POST"]),
            ],
            redirect_slashes=False,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request; also those that no path is for."""
        scope["app"] = self  # for Starlette to raise what it would answer in its own form
        try:
            await self._router(scope, receive, send)
        except HTTPException as error:
            why = {404: "there is no such path; / lists them", 405: "this path takes another method"}
            answer = _error(error.status_code, why.get(error.status_code, error.detail), error.headers)
            await answer(scope, receive, send)
        except Refusal as refusal:
            await _error(refusal.code, refusal.why, refusal.headers)(scope, receive, send)

    async def _page(self, request: Request) -> Response:
        return HTMLResponse(self._html)

    async def _description(self, request: Request) -> Response:
        return Response(self._openapi, media_type="application/json")

    async def _metrics(self, request: Request) -> Response:
        return metrics_answer(ServerCollector(self._models, self._room))

    async def _server(self, request: Request) -> Response:
        extensions = ["binary_tensor_data", "model_repository", "parameters"]
        return JSONResponse({"name": "anchorline", "version": __version__, "extensions": extensions})

    async def _live(self, request: Request) -> Response:
        return JSONResponse({"live": True})

    async def _ready(self, request: Request) -> Response:
        failed = {name: why for name, each in self._models.items() if (why := each.batcher.failure)}
        answer: dict[str, object] = {"ready": not failed}
        if failed and request.scope[GRANTED]:
            answer["problems"] = failed
        return JSONResponse(answer, 503 if failed else 200)

    async def _index(self, request: Request) -> Response:
        return JSONResponse(
            [
                {
                    "name": name,
                    "version": protocol.VERSION,
                    "state": "UNAVAILABLE" if each.batcher.failure else "READY",
                    "reason": each.batcher.failure or "",
                }
                for name, each in self._models.items()
            ]
        )

    async def _metadata(self, request: Request) -> Response:
        return JSONResponse(self._model(request).metadata())

    async def _model_ready(self, request: Request) -> Response:
        model = self._model(request)
        is_ready = model.batcher.failure is None
        return JSONResponse({"name": model.name, "ready": is_ready}, 200 if is_ready else 503)

    async def _infer(self, request: Request) -> Response:
        model = self._model(request)
        return await self._answered(request, model, "infer", partial(self._read_infer, request, model))

    async def _detect(self, request: Request) -> Response:
        model = self._model(request)
        return await self._answered(request, model, "detect", partial(self._read_detect, request))

    def _model(self, request: Request) -> Model:
        """The one that the path or ``?model=`` names, or the only one. Raises ``Refusal``."""
        name, version = (request.path_params.get(key) for key in ("name", "version"))
        if name is None:
            name = request.query_params.get(
                "model", next(iter(self._models)) if len(self._models) == 1 else None
            )
        names = ", ".join(self._models)
        if name is None:
            raise Refusal(400, f"several models are served; name one of {names} as /detect/NAME")
        if name not in self._models:
            raise Refusal(404, f"there is no model {shown(name)}; expected one of {names}")
        if version not in (None, protocol.VERSION):
            raise Refusal(404, f"{name} has no version {shown(version)}; expected {protocol.VERSION}")
        return self._models[name]

    async def _answered(
        self, request: Request, model: Model, path: str, read: Callable[[bytes, Share], _Asked]
    ) -> Response:
        """The answer, and a note of it for the metrics."""
        begun, code = time.monotonic(), _GONE
        try:
            answer = await self._answer(request, model, read)
            code = answer.status_code
        except ClientDisconnect:
            model.batcher.figures.gone += 1
            raise
        finally:
            model.answers.counts[path, code] += 1
        if code == 200:
            model.answers.seconds.add(time.monotonic() - begun)
        return answer

    async def _answer(
        self, request: Request, model: Model, read: Callable[[bytes, Share], _Asked]
    ) -> Response:
        try:
            return await self._found(request, model, read)
        except Refusal as refusal:
            return _error(refusal.code, refusal.why, refusal.headers)
        except QueueFull:
            full = busy(f"{model.name} has {self._options.queue} requests in hand")
            return _error(full.code, full.why, full.headers)
        except asyncio.TimeoutError:
            model.batcher.figures.late += 1
            return _error(504, "there was no result in time; ask for less at once, or allow more time")
        except (DataError, FrameError, SettingsError) as error:
            return _error(400, str(error))
        except ClientDisconnect:
            raise
        except Exception as error:  # told in the log where it is no mistake of a user
            return _error(500, f"{model.name} could not answer: {one_line(error) or type(error).__name__}")

    async def _found(
        self, request: Request, model: Model, read: Callable[[bytes, Share], _Asked]
    ) -> Response:
        options, headers = self._options, request.headers
        if not is_of_own_page(headers):
            raise Refusal(403, "expected a request of a program, or of this server's own page")
        if (coding := headers.get("content-encoding", "identity")).lower() != "identity":
            raise Refusal(415, f"the body is encoded as {shown(coding)}; send it as it is")
        model.batcher.check_room()  # before a body that is for nothing
        with self._room.share() as share:
            body = await read_body(request, share, options.body_bytes, options.body_seconds)
            with model.batcher.place():
                request.scope[KEPT] = True
                try:
                    return await while_there(request, self._detected(model, partial(read, body, share)))
                finally:
                    del request.scope[KEPT]

    async def _detected(self, model: Model, read: Callable[[], _Asked]) -> Response:
        """Decoding and detection, within the deadline; raises ``asyncio.TimeoutError``."""
        loop = asyncio.get_running_loop()
        begun, allowed = loop.time(), self._options.deadline
        asked = await asyncio.wait_for(loop.run_in_executor(self._threads, read), allowed)
        asked.filters.check_names(model.contract.names)
        left = begun + min(asked.timeout or allowed, allowed) - loop.time()
        found = await asyncio.wait_for(model.batcher.detect(asked.frame), left)
        height, width = asked.frame.shape[:2]
        return asked.write(asked.filters(found, (height, width)))

    def _read_infer(self, request: Request, model: Model, body: bytes, share: Share) -> _Asked:
        """In a thread: the frame and wishes of a request of the protocol."""
        stated = request.headers.get(protocol.HEADER_LENGTH)
        if stated is not None and not (stated.isascii() and stated.isdecimal() and len(stated) < 16):
            raise DataError(f"{protocol.HEADER_LENGTH} is {shown(stated)}; expected a number of bytes")
        length = None if stated is None else int(stated)
        share.grow(_JSON_GROWS * min(len(body), len(body) if length is None else length))
        asked = protocol.read_request(body, length)

        def write(found: Detections) -> Response:
            content, length = protocol.write_answer(found, model.name, asked)
            if length is None:
                return Response(content, media_type="application/json")
            headers = {protocol.HEADER_LENGTH: str(length)}
            return Response(content, media_type="application/octet-stream", headers=headers)

        frame = asked.frame if isinstance(asked.frame, np.ndarray) else _decoded(asked.frame, share)
        return _Asked(frame, asked.filters, asked.timeout, write)

    def _read_detect(self, request: Request, body: bytes, share: Share) -> _Asked:
        """In a thread: the frame and wishes of a request whose body is a picture."""
        if request.headers.get("content-type", "").lower().startswith("multipart/"):
            raise Refusal(415, "expected the picture alone as the body, as of curl --data-binary @image.jpg")
        query = request.query_params
        texts = {name: query.getlist(name) for name in query}
        for name in ("model", "source", "timeout"):
            texts.pop(name, None)
        source = query.get("source", "image")
        if len(source) > _LONGEST_TEXT:
            raise SettingsError(f"source has {len(source)} characters; expected {_LONGEST_TEXT} at most")
        timeout = query.get("timeout")
        try:
            seconds = None if timeout is None else float(timeout)
        except ValueError:
            seconds = -1.0
        if seconds is not None and not seconds > 0:
            raise SettingsError(f"timeout is {shown(timeout)}; expected seconds above 0")
        filters = protocol.read_filters(texts)
        frame = _decoded(body, share)

        def write(found: Detections) -> Response:
            height, width = frame.shape[:2]
            record = record_of(source, found, (height, width))
            return Response(json_text(record), media_type="application/json")

        return _Asked(frame, filters, seconds, write)


def _decoded(content: bytes, share: Share) -> NDArray[np.uint8]:
    """A JPEG or PNG as uint8 BGR [H, W, 3]; other formats are not for everybody to send."""
    if not content.startswith(_IMAGE_STARTS):
        begins = f"begins with {content[:8]!r}" if content else "is empty"
        raise DataError(f"the image {begins}; expected a JPEG or PNG")
    header = read_header(content)
    if header is not None:  # else the decoder says what is wrong
        height, width = header.size
        share.grow(3 * height * width)
    return decode_image(content, "the image")


def _error(code: int, why: str, headers: Mapping[str, str] | None = None) -> Response:
    return Response(json.dumps({"error": one_line(why)}), code, headers, "application/json")
