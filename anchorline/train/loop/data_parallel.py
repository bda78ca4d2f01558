"""The model in several processes: losses whose gradients PyTorch's DDP averages, and norms in step."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from anchorline.runtime.io.errors import SettingsError
from anchorline.train.data.dataset import Batch
from anchorline.train.loop.distributed import process_count

BatchLosses = Callable[[Batch], dict[str, Tensor]]


class SharedLosses:
    """``losses`` of ``model`` on each process's part of a batch; the backward pass averages the gradients.

    Divided by ``distributed.mean_count``, they have the gradients that one process has with the whole batch.
    """

    def __init__(self, model: nn.Module, losses: BatchLosses) -> None:
        # Buffers are the same everywhere, frozen or kept in step by SyncBatchNorm: sending them costs alone.
        known = inspect.signature(DistributedDataParallel.__init__).parameters
        before = "broadcast_buffers"  # the name of older versions of PyTorch
        name = "forward_sync_buffers" if "forward_sync_buffers" in known else before
        unsent: dict[str, Any] = {name: False}
        self._parallel = DistributedDataParallel(_LossModule(model, losses), **unsent)
        self._settle_buckets()

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        found: dict[str, Tensor] = self._parallel(batch)
        return found

    def added_up(self, wanted: bool) -> AbstractContextManager[None]:
        """Where ``wanted``, backward passes in the block only add to this process's own gradients."""
        return self._parallel.no_sync() if wanted else contextlib.nullcontext()

    def _settle_buckets(self) -> None:
        """Have DDP lay out its buckets for good, by a backward pass that does nothing.

        It does so after the first one, and the last bits of a sum over three or more processes depend on
        the layout: a resumed run would not sum as one that was not interrupted.
        """
        self._parallel(None)["nothing"].backward()
        self._parallel.zero_grad(set_to_none=True)


class _LossModule(nn.Module):
    """The losses as a module's forward pass, as DDP wants them."""

    def __init__(self, model: nn.Module, losses: BatchLosses) -> None:
        super().__init__()
        self.model, self.losses = model, losses

    def forward(self, batch: Batch | None) -> dict[str, Tensor]:
        if batch is not None:
            return self.losses(batch)
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return {"nothing": 0.0 * torch.stack([parameter.sum() for parameter in trained]).sum()}


def synchronise_norms(model: nn.Module, device: torch.device) -> None:
    """Have live batch norms take their statistics over all processes; alone, leave them as they are.

    Raises ``SettingsError`` off CUDA, where PyTorch has no such norm: with statistics of its own part
    of a batch each process would train another model.
    """
    live = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.BatchNorm2d  # FrozenBatchNorm derives from it
    ]
    if process_count() == 1 or not live:
        return
    if device.type != "cuda":
        raise SettingsError(
            f"the model has live batch norms, which {process_count()} processes on {device.type} cannot keep "
            "in step (PyTorch does on CUDA alone); expected model.backbone_norm='frozen' and "
            "model.box_convs=0, or one process"
        )
    for parent, name, child in live:
        setattr(parent, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))
