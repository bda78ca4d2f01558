"""``anchorline detect --ray``: the same on a cluster."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from anchorline.cluster import ClusterSummary


def uses_ray(address: str | None, workers: int | None, others: Mapping[str, object]) -> bool:
    """Whether ``--ray`` was given. Raises ``SettingsError`` for an option that does not go with that.

    ``others`` are the options that make no sense on a cluster, of which none may be set.
    """
    from anchorline.runtime.io.errors import SettingsError

    if address is None and workers is not None:
        raise SettingsError(
            f"--ray-workers is {workers}, but without --ray nothing is shared out; add --ray auto"
        )
    for name, value in others.items():
        if address is not None and value:
            raise SettingsError(f"{name} does not go with --ray, which answers files; leave out one of them")
    return address is not None


def detect_on_ray(
    sources: Sequence[str], model: Path, tell: Callable[[ClusterSummary], None], **settings: Any
) -> None:
    """``cluster.detect_on_cluster`` with progress and its summary for ``tell``, after an interrupt as well.

    Exit code 1 where files were given up, each with a line on stderr.
    """
    from anchorline.cluster import detect_on_cluster
    from anchorline.cluster.display import progress_display

    summaries: list[ClusterSummary] = []
    try:
        with progress_display() as show:  # told after it: the bar takes over stdout while it is there
            detect_on_cluster(sources, model, progress=show, conclude=summaries.append, **settings)
    finally:
        for summary in summaries:
            tell(summary)
            for line in summary.failed:
                print(f"anchorline: failed: {line}", file=sys.stderr)
    if any(summary.failed for summary in summaries):
        raise typer.Exit(1)
