"""The options of ``--serve``, and the live view that they ask for."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from anchorline.console import warn

if TYPE_CHECKING:
    from anchorline.serving.live_view import LiveView

ServeOption = Annotated[
    str | None,
    typer.Option(
        metavar="[HOST:]PORT",
        help="Show the run in a browser at this address; a port alone is for this machine only.",
    ),
]
ServeTokenOption = Annotated[
    str | None,
    typer.Option(
        envvar="ANCHORLINE_SERVE_TOKEN",
        help="What viewers have to show; better set in the environment, which other users cannot see.",
    ),
]
ServeNamesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--serve-name",
        metavar="NAME",
        help="A name by which browsers may reach it, beside IP addresses and this machine's own name; "
        "may be repeated.",
    ),
]


@contextlib.contextmanager
def live_view(serve: str | None, token: str | None, names: Sequence[str] | None) -> Iterator[LiveView | None]:
    """A live view that is served inside the block, or ``None`` where nobody asked for one."""
    if serve is None:
        yield None
        return
    from anchorline.serving.live_view import LiveView

    with LiveView(serve, token=token, names=names or ()) as view:
        warn(view.warnings)
        shown = view.url if token is None else f"{view.url}?token=... (with the token)"
        print(f"anchorline: live view at {shown}", file=sys.stderr)
        yield view
