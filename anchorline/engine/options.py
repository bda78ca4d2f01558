"""What a build is asked for, checked."""

from __future__ import annotations

from dataclasses import dataclass

from anchorline.engine.lowering import NMS_FORMS
from anchorline.engine.mixed_precision import PRECISIONS
from anchorline.runtime.contract import Contract
from anchorline.runtime.io.errors import SettingsError
from anchorline.runtime.tensorrt.library import FLAVOURS

Batch = tuple[int, int, int]


@dataclass(frozen=True)
class BuildOptions:
    """Options of ``build_engine``; raises ``SettingsError`` for values that cannot be used.

    ``target`` "tensorrt" builds for the GPU at hand, "tensorrt-rtx" without one for
    ``compute_capabilities`` (86 for 8.6; all from 80 on when empty). ``batch`` is (smallest, best, largest)
    within the exported batch; by default 1, 1 and the exported ``max_batch`` (1 where that is free).
    ``nms`` "plugin" needs our plugins wherever the engine runs, "fixed-point" runs in any loader.
    ``workspace`` is in MiB. The two compatibilities are full TensorRT's.
    """

    target: str = "tensorrt"
    precision: str = "fp16"
    batch: Batch | None = None
    compute_capabilities: tuple[int, ...] = ()
    nms: str = "plugin"
    workspace: int | None = None
    optimization_level: int | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False

    def __post_init__(self) -> None:
        for name, choices in (("target", FLAVOURS), ("precision", PRECISIONS), ("nms", NMS_FORMS)):
            value = getattr(self, name)
            if value not in choices:
                raise SettingsError(f"{name} is {value!r}; expected one of {', '.join(choices)}")
        if self.workspace is not None and self.workspace < 1:
            raise SettingsError(f"workspace is {self.workspace} MiB; expected at least 1")
        level = self.optimization_level
        if level is not None and level not in range(6):
            raise SettingsError(f"optimization level is {level}; expected 0 to 5")
        if self.target == "tensorrt" and self.compute_capabilities:
            named = ", ".join(map(str, self.compute_capabilities))
            raise SettingsError(
                f"compute capability is {named}; TensorRT builds for the GPU at hand, so leave it out or "
                "build with --for tensorrt-rtx"
            )
        if self.target == "tensorrt-rtx":
            for name in ("version_compatible", "hardware_compatible"):
                if getattr(self, name):
                    raise SettingsError(
                        f"{name.replace('_', ' ')} is set; TensorRT for RTX has no such engines, "
                        "name the compute capabilities instead"
                    )

    def resolve_batch(self, contract: Contract) -> Batch:
        """The batch profile, within what was exported; (1, 1, largest) when none was asked for."""
        largest = contract.max_batch
        low, best, high = self.batch or (1, 1, largest or 1)
        if not 1 <= low <= best <= high:
            raise SettingsError(
                f"batch is {low}:{best}:{high}; expected MIN:OPT:MAX with 1 <= MIN <= OPT <= MAX"
            )
        if largest is not None and high > largest:
            raise SettingsError(
                f"batch is {low}:{best}:{high}; the model was exported for at most {largest}: stay within it "
                "or export with a larger --max-batch"
            )
        return low, best, high
