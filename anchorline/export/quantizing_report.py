"""What a quantisation did: shown as a table, written as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anchorline.evaluation.verify.report import VerifyReport
from anchorline.export.quantizing_loss import Loss
from anchorline.export.quantizing_sensitivity import Sensitivity
from anchorline.runtime.contract import Contract

if TYPE_CHECKING:
    from rich.table import Table

_SHOWN = 12  # of the integer layers; --json has all


@dataclass(frozen=True)
class QuantizeResult:
    """The published file and its contract, what it loses, and what every layer costs.

    ``last_layers`` are float by rule, ``float_layers`` because they cost too much; ``sizes`` are the bytes
    of the float file and of this one; ``tries`` how often the loss was measured.
    """

    path: Path
    contract: Contract
    target: str
    data: str
    images: int
    method: str
    loss: Loss
    tries: int
    layers: tuple[Sensitivity, ...]
    float_layers: tuple[str, ...]
    last_layers: tuple[str, ...]
    sizes: tuple[int, int]
    verification: VerifyReport | None
    warnings: tuple[str, ...]

    def describe(self) -> str:
        """One line: what it is and what it costs."""
        before, after = (size / 1e6 for size in self.sizes)
        integer = len(self.layers) - len(self.float_layers)
        floats = len(self.float_layers) + len(self.last_layers)
        verdict = "not verified" if self.verification is None else self.verification.describe()
        return (
            f"int8 for {self.target}, {integer} layers in integers and {floats} in float, "
            f"{before:.1f} MB became {after:.1f} MB; {self.loss.describe()} "
            f"on {self.images} images; {verdict}"
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "for": self.target,
            "data": self.data,
            "images": self.images,
            "method": self.method,
            "loss": self.loss.to_json(),
            "tries": self.tries,
            "float_layers": list(self.float_layers),
            "last_layers": list(self.last_layers),
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            "bytes": {"float": self.sizes[0], "int8": self.sizes[1]},
            "verified": None if self.verification is None else self.verification.passed,
            "warnings": list(self.warnings),
        }

    def render(self) -> Table:
        """The layers that went back to float, and the most costly of the others."""
        return layer_table(self.layers, self.float_layers)


def layer_table(layers: Sequence[Sensitivity], floats: Collection[str]) -> Table:
    """A rich table of the most costly layers."""
    from rich.markup import escape
    from rich.table import Table

    shown = [layer for layer in layers if layer.name in floats]
    integer = [layer for layer in layers if layer.name not in floats]
    rest = len(integer) - _SHOWN
    more = f"\nand {rest} layers that cost less" if rest > 0 else ""
    table = Table(
        title="what each layer costs in integers, the most costly first",
        caption=f"SNR: signal to rounding noise; effect: how far it alone moves scores and boxes{more}",
        caption_justify="left",
    )
    table.add_column("layer", overflow="fold")
    for column in ("computes in", "SNR, dB", "effect"):
        table.add_column(column, justify="right")
    for layer in [*shown, *integer[:_SHOWN]]:
        effect = "-" if layer.effect is None else f"{layer.effect:.2%}"
        kind = "float" if layer.name in floats else "integers"
        table.add_row(escape(layer.name), kind, f"{layer.sqnr_db:.1f}", effect)
    return table
