"""Detection in many files on many machines, with Ray: the lines of ``anchorline detect``, from a cluster.

Files become items (``planning``), which workers that hold a detector each (``worker``, on the cluster by
``fleet``) answer one at a time (``dispatching``); what fails is tried again (``work_queue``), and the
answers are put together in the order of the files (``merging``). Only ``connecting`` and ``fleet``
import Ray, when they are used.
"""

from __future__ import annotations

from anchorline.cluster.connecting import ClusterError
from anchorline.cluster.detecting import detect_on_cluster
from anchorline.cluster.dispatching import Progress, WorkerState
from anchorline.cluster.summary import ClusterSummary

__all__ = ["ClusterError", "ClusterSummary", "Progress", "WorkerState", "detect_on_cluster"]
