"""A run in the browser: the sink that the pipeline writes to, where it is served, and the server."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable

from anchorline.runtime.io.errors import SettingsError
from anchorline.runtime.video.frames import Result
from anchorline.runtime.video.pipeline import VideoPipeline
from anchorline.serving.access import HEADERS, Gate, content_policy
from anchorline.serving.application import Pages, read_page
from anchorline.serving.connections import Limits, Server
from anchorline.serving.listening import Address, listen, parse_address
from anchorline.serving.live_state import LiveState


class LiveView:
    """Serves a page with every source's annotated stream and figures, ``/metrics`` and ``/healthz``.

    >>> with LiveView("127.0.0.1:8080") as view:
    ...     with VideoPipeline(detector, ["cam1=rtsp://camera/live"], sinks=[view]) as pipeline:
    ...         view.watch(pipeline)
    ...         for result in pipeline:
    ...             ...

    ``where`` is ``HOST:PORT``, or a port alone for this machine only; port 0 is any free one, and ``url``
    says which. The port is taken at once, served inside the ``with`` block. ``token`` is what viewers have to
    show, ``names`` are host names of this machine beside its own, ``limits`` what connections may take.
    ``warnings`` are lines for whoever starts it. Raises ``SettingsError`` for an address, token or name that
    cannot be used, such as a port that is taken.
    """

    wants_drawing = False

    def __init__(
        self,
        where: str | int,
        *,
        token: str | None = None,
        names: Iterable[str] = (),
        limits: Limits | None = None,
    ) -> None:
        html = read_page()
        self._live = LiveState()
        gate = Gate(Pages(self._live, html).router, token, names)
        self._socket = listen(parse_address(str(where)))
        self.address = Address(*self._socket.getsockname()[:2])
        self.url = self.address.url
        self.warnings: list[str] = []
        if token is None and not self.address.is_loopback:
            self.warnings.append(
                f"the live view at {self.address} has no token: whoever reaches it on the network sees the "
                "pictures and moves the controls; set --serve-token, or serve at 127.0.0.1"
            )
        headers = {**HEADERS, "content-security-policy": content_policy(html)}
        self._server = Server(gate, headers, limits or Limits())
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._serve, name="anchorline live server", daemon=True)

    def watch(self, pipeline: VideoPipeline) -> None:
        """Show this run; to be called before it begins."""
        self._live.watch(pipeline)

    def write(self, result: Result) -> None:
        """Lay the result down for the viewers; takes no time that depends on them."""
        self._live.note(result)

    def close(self) -> None:
        """The run has ended well."""
        self._live.phase = "ended"

    def abandon(self) -> None:
        """The run has failed."""
        self._live.phase = "failed"

    def __enter__(self) -> LiveView:
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise SettingsError(
                    f"the live view cannot be served ({self._error}); see the packages' versions"
                )
            time.sleep(0.01)
        self._live.painter.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.closed = True
        self._live.wake()
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()
        self._live.painter.stop()

    def _serve(self) -> None:
        try:
            self._server.run([self._socket])
        except BaseException as error:  # SystemExit included, which is uvicorn's way to fail
            self._error = error
