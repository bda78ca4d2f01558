"""Detection in many files on many machines, with Ray: the lines of ``anchorline detect``, from a cluster.

Files become items, which workers with a detector each answer in pieces (``worker``). ``run`` hands
them out and hears the answers through Ray, which holds the processes, places them on the machines and moves
what travels; ``outputs`` puts the answers together in the order of the files.
"""

from __future__ import annotations

from anchorline.cluster.connection import ClusterError
from anchorline.cluster.run import ClusterSummary, Progress, detect_on_cluster
from anchorline.cluster.worker import WorkerState

__all__ = ["ClusterError", "ClusterSummary", "Progress", "WorkerState", "detect_on_cluster"]
