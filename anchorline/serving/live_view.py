"""A run in the browser: the sink that the pipeline writes to, and the server that shows it."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType

from anchorline.runtime.io.errors import SettingsError
from anchorline.runtime.video.frames import Result
from anchorline.runtime.video.pipeline import VideoPipeline
from anchorline.serving.access import Access
from anchorline.serving.address import bound_address, browser_url, is_loopback, listen, parse_address
from anchorline.serving.application import create_application
from anchorline.serving.live_state import LiveState
from anchorline.serving.server import ServerThread


class LiveView:
    """Serves a page with every source's annotated stream and figures, ``/metrics`` and ``/healthz``.

    >>> with LiveView("127.0.0.1:8080") as view:
    ...     with VideoPipeline(detector, ["cam1=rtsp://camera/live"], sinks=[view]) as pipeline:
    ...         view.watch(pipeline)
    ...         for result in pipeline:
    ...             ...

    ``where`` is ``HOST:PORT``, or a port alone for this machine only; port 0 is any free one, and ``url``
    says which. The port is taken at once, served inside the ``with`` block. ``token`` is what viewers have to
    show, ``names`` are host names of this machine beside its own. ``warnings`` are lines for whoever
    starts it. Raises ``SettingsError`` for an address, token or name that cannot be used, such as a
    port that is taken.
    """

    wants_drawing = False

    def __init__(self, where: str | int, *, token: str | None = None, names: Iterable[str] = ()) -> None:
        self._socket = listen(parse_address(str(where)))
        try:
            self.address = bound_address(self._socket)
            self._live = LiveState(Access(token, names, self.address.port))
        except SettingsError:
            self._socket.close()
            raise
        self.url = browser_url(self.address)
        self.warnings = [] if token or is_loopback(self.address) else [_open_to_all(str(self.address))]
        application = create_application(self._live)
        self._server = ServerThread(application, self._socket, self._live.audience.begin)

    def watch(self, pipeline: VideoPipeline) -> None:
        """Show this run; to be called before it begins."""
        self._live.run.watch(pipeline)
        options, detector = pipeline.options, pipeline.detector
        thresholds = getattr(getattr(detector, "contract", None), "thresholds", None)
        lowest = (
            getattr(thresholds, "score", 0.0),
            getattr(detector, "score_threshold", 0.0),
            options.filters.min_scores.get("", 0.0),
        )
        self._live.controls.begin(max(lowest), options.shown_score)

    def write(self, result: Result) -> None:
        """Lay the result down for the viewers; takes no time that depends on them."""
        self._live.run.note(result)
        self._live.painter.offer(result)

    def close(self) -> None:
        """The run has ended well."""
        self._live.run.phase = "ended"

    def abandon(self) -> None:
        """The run has failed."""
        self._live.run.phase = "failed"

    def __enter__(self) -> LiveView:
        self._live.painter.start()
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.audience.close()
        self._server.stop()
        self._live.painter.stop()


def _open_to_all(address: str) -> str:
    return (
        f"the live view at {address} has no token: whoever reaches it on the network sees the pictures and "
        "moves the controls; set --serve-token, or serve at 127.0.0.1"
    )
