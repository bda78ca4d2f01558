"""Detection in files on a cluster: everything is checked, then started, then put together."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from anchorline import __version__
from anchorline.cluster.answering import answer
from anchorline.cluster.connecting import AUTO, check_address, connected
from anchorline.cluster.dispatching import SILENCE, Progress
from anchorline.cluster.fleet import RayFleet
from anchorline.cluster.job import Job
from anchorline.cluster.merging import Copies
from anchorline.cluster.model_files import model_files
from anchorline.cluster.planning import make_items, plan_files
from anchorline.cluster.summary import ClusterSummary
from anchorline.cluster.tally import Tally
from anchorline.cluster.work_queue import WorkQueue
from anchorline.cluster.worker import DetectionWorker
from anchorline.runtime.io.errors import SettingsError
from anchorline.runtime.video.options import DetectOptions
from anchorline.runtime.video.paths import check_outputs
from anchorline.runtime.video.signals import signals_as_exit

_IMAGES = 16  # of an item: some seconds of work, which is what a lost machine costs
_TRIES = 3


def detect_on_cluster(
    sources: Sequence[str | Path],
    model: str | Path,
    options: DetectOptions | None = None,
    *,
    address: str = AUTO,
    workers: int | None = None,
    images_per_item: int = _IMAGES,
    tries: int = _TRIES,
    silence: float = SILENCE,
    progress: Callable[[Progress], object] | None = None,
    conclude: Callable[[ClusterSummary], object] | None = None,
    worker_type: type[DetectionWorker] = DetectionWorker,
) -> ClusterSummary:
    """``runtime.detect`` for files, by workers on a Ray cluster; lines and copies are those of the local run.

    ``address`` is ``"auto"`` (the cluster that this machine belongs to), ``"host:port"``, or ``"local"``
    (one that is started here). Up to ``workers`` are used, by default as many as the cluster has room
    for; ``options.threads`` are the cores of each. ``tries`` bounds how often an item (up to
    ``images_per_item`` images, or a video) is tried whose worker dies or says nothing for ``silence``
    seconds; files that are given up stand in the summary's ``failed``. ``progress`` is called a few times
    a second. ``conclude`` gets the summary in any case: on Ctrl-C and SIGTERM the outputs hold the files
    that were answered, and
    ``KeyboardInterrupt`` or ``SystemExit`` goes on. Raises ``SettingsError``, ``DataError`` (also where no
    file could be read), ``ArtefactError``, ``OutputError`` and ``ClusterError``; what can be checked
    before is checked before a cluster is started.
    """
    options = options or DetectOptions()
    _check_options(options)
    for name, count in (("workers", workers), ("images_per_item", images_per_item), ("tries", tries)):
        _check_count(name, count)
    files = plan_files(sources, options.save, options.stride)
    targets = (file.target for file in files if file.target)
    check_outputs([options.jsonl], [model, *(file.path for file in files), *targets])
    check_address(address)
    is_engine = Path(model).suffix.lower() == ".engine"
    parts = model_files(model)
    with connected(address) as cluster, signals_as_exit(), Copies(files) as copies:
        cpus, gpus = cluster.shares(options.provider, is_engine, options.threads)
        job = Job(
            version=__version__,
            folder=os.getcwd(),
            model=parts,
            options=options if gpus else replace(options, threads=cpus),
            copies=None if copies.folder is None else str(copies.folder),
            token=copies.token,
        )
        most = workers or cluster.room(cpus, gpus)
        return answer(
            RayFleet(cluster, job, cpus, gpus, worker_type),
            WorkQueue(make_items(files, most, images_per_item), tries),
            Tally(len(files)),
            copies,
            options.jsonl,
            most,
            silence=silence,
            progress=progress,
            conclude=conclude,
        )


def _check_options(options: DetectOptions) -> None:
    """Raise ``SettingsError`` for what a cluster does not do."""
    others = {
        "--policy latest": options.policy == "latest",
        "--report": options.report,
        "--track": options.track,
        "--trails": options.trails,
    }
    for name, value in others.items():
        if value:
            raise SettingsError(f"{name} does not go with --ray, which answers files; leave out one of them")


def _check_count(name: str, value: int | None) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise SettingsError(f"{name} is {value!r}; expected a whole number of at least 1")
