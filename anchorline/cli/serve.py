"""``anchorline serve``: models behind an address."""

from __future__ import annotations

from typing import Annotated

import typer

from anchorline.cli.options import NameOption, TokenOption, spelled_out
from anchorline.console import say, warn
from anchorline.serving.serve_options import ServeOptions


@spelled_out
def serve(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL",
            help="Exported model.onnx files or engines; NAME=... names one, else its file's name does.",
        ),
    ],
    *,
    host: Annotated[
        str, typer.Option(help="The address to listen at; 0.0.0.0 is every one of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Its port; 0 is any free one.")] = 8000,
    options: ServeOptions,
    token: TokenOption = None,
    name: NameOption = None,
) -> None:
    """Answer detection requests over HTTP: the Open Inference Protocol, and pictures in, JSON out."""
    from anchorline.serving.inference_server import InferenceServer, parse_models

    server = InferenceServer(
        parse_models(models), options, host=host, port=port, token=token, names=name or ()
    )
    warn(server.warnings)
    say(f"anchorline: serving {', '.join(server.models)} at {server.url}", to_stderr=True)
    server.run()
