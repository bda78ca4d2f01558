"""``RUN/last/``: what a training needs to go on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from anchorline.runtime.errors import ArtefactError
from anchorline.runtime.files import atomic_path
from anchorline.train.settings import Settings

# The progress stands inside the one state file, so that a kill cannot leave two files that disagree.
STATE_FILE = "state.pt"


def save_state(folder: Path, progress: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write ``progress`` (plain values) and ``state`` (state dicts) as one file."""
    with atomic_path(folder / STATE_FILE) as temporary:
        try:
            torch.save({"progress": json.dumps(progress), "state": dict(state)}, temporary)
        except RuntimeError as error:  # how PyTorch reports a full disk
            raise OSError("PyTorch could not write all of it") from error


def load_state(folder: Path, settings: Settings) -> tuple[dict[str, Any], dict[str, Any]]:
    """Progress and state of the last full epoch.

    Raises ``ArtefactError`` when there is none, or when it was trained with other settings.
    """
    path = folder / STATE_FILE
    if not path.is_file():
        raise ArtefactError(
            f"{path}: no such file; there is no full epoch to resume from, train without --resume"
        )
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        progress, state = json.loads(saved["progress"]), saved["state"]
        trained_with = {table: dict(progress["settings"][table]) for table in ("model", "training")}
    except Exception as error:  # torch.load raises many kinds for damaged files
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ArtefactError(f"{path}: cannot be read ({reason[:120]}); train without --resume") from None
    check_trained_with(path, trained_with, settings)
    return progress, state


def check_trained_with(path: Path, trained_with: Mapping[str, Mapping[str, Any]], settings: Settings) -> None:
    """Raise ``ArtefactError`` for the first of ``settings`` that was another one."""
    wanted = json.loads(json.dumps(settings.to_dict()))
    for table, values in wanted.items():
        for name, value in values.items():
            before = trained_with[table].get(name)
            if before != value:
                raise ArtefactError(
                    f"{path}: was trained with {table}.{name} = {before!r}, not {value!r}; "
                    "resume with the same settings, or train without --resume"
                )
