"""Named points of the network, where another runtime can be compared with PyTorch.

``mark(name, tensor)`` stands in the model wherever one stage hands over to the next. In training and
inference it costs a look at a variable. In an ONNX export it becomes a node that the exporter turns
into the name of the value (``export/onnx_export.py``). Under ``tapped`` a visitor sees each tensor, and may
put another in its place: so one stage can be fed what another runtime computed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from anchorline.runtime.contract import DOMAIN, OP_VERSION

Visitor = Callable[[str, Tensor], Tensor]

MARKER = "Stage"
_visitor: Visitor | None = None


def mark(name: str, tensor: Tensor) -> Tensor:
    """``tensor``, known from here on as ``name`` to verification and to the exported graph."""
    if torch.onnx.is_in_onnx_export():
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::{MARKER}",
            (tensor,),
            {"name": name},
            dtype=tensor.dtype,
            shape=tensor.shape,
            version=OP_VERSION,
        )
    return tensor if _visitor is None else _visitor(name, tensor)


@contextlib.contextmanager
def tapped(visitor: Visitor) -> Iterator[None]:
    """Call ``visitor(name, tensor)`` at each mark; what it returns goes on through the network."""
    global _visitor
    before, _visitor = _visitor, visitor
    try:
        yield
    finally:
        _visitor = before
