"""The state folder: the plan, one marker a finished run, and the rows that are published from them.

STATE/plan.json               options, costs, epochs, runs; written before anything is trained
STATE/spent.json              seconds so far
STATE/RUN/finished.json       the hash of what decides the run, and what it gave
"""

from __future__ import annotations

import csv
import json
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import record

from anchorline.runtime.io.errors import ArtefactError, SettingsError
from anchorline.runtime.io.files import write_json
from paper_experiments.runs import Run

RESULTS = "paper"
COLUMNS = (
    *("study", "data", "images", "preset", "canvas", "device", "threads"),
    *("experiment", "variant", "seed", "epochs", "train_s", "proposals", "found"),
    *("voc07", "map50", "map", "recall50", "recall70", "ar"),
    *("conv_ms", "rpn_ms", "selection_ms", "region_ms", "note"),
)


@dataclass(frozen=True)
class Result:
    """What a run gave: ``rows`` of the table (``COLUMNS``; what is left out is empty), and recall ``curves``.

    A curve is the recall by number of proposals and IoU, under the name of where they come from.
    """

    rows: list[dict[str, Any]]
    curves: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)


class State:
    """One study's state folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def plan_file(self) -> Path:
        return self.folder / "plan.json"

    def plan(self, described: Mapping[str, Any]) -> dict[str, Any] | None:
        """The plan of an earlier sitting, None where there is none.

        Raises ``SettingsError`` where it was made for another study, ``ArtefactError`` where it is damaged.
        """
        if not self.plan_file.is_file():
            return None
        try:
            plan: dict[str, Any] = json.loads(self.plan_file.read_text(encoding="utf-8"))
            before = plan["study"]
            plan["runs"] = [Run(**{**each, "needs": tuple(each["needs"])}) for each in plan["runs"]]
            int(plan["epochs"]), str(plan["id"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtefactError(
                f"{self.plan_file}: cannot be read ({error!r}); expected a study's plan; take another --state"
            ) from None
        for name, value in described.items():
            if before.get(name) != value:
                raise SettingsError(
                    f"{self.plan_file}: was made with {name} = {_difference(before.get(name), value)}; "
                    "expected the options of the first sitting, or another --state"
                )
        return plan

    def write_plan(self, content: Mapping[str, Any]) -> None:
        write_json(self.plan_file, {"id": secrets.token_hex(4), **content})

    def run_folder(self, run: Run) -> Path:
        return self.folder / run.name

    def finished(self, run: Run, key: str) -> Result | None:
        """What a finished run gave; None where there is no marker, or one of something else."""
        path = self.run_folder(run) / "finished.json"
        if not path.is_file():
            return None
        try:
            marker = json.loads(path.read_text(encoding="utf-8"))
            return Result(marker["rows"], marker["curves"]) if marker["key"] == key else None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtefactError(
                f"{path}: cannot be read ({error!r}); expected a finished run's marker; remove the file "
                "to measure the run again"
            ) from None

    def finish(self, run: Run, key: str, result: Result) -> None:
        """Write the marker, and remove what was only there to go on with."""
        path = self.run_folder(run) / "finished.json"
        write_json(path, {"key": key, "rows": result.rows, "curves": result.curves})
        for last in (*self.run_folder(run).glob("last"), *self.run_folder(run).glob("step-*/last")):
            shutil.rmtree(last)

    def begin(self, run: Run, key: str) -> Path:
        """The run's folder; what another study or other settings left in it is removed."""
        folder, mark = self.run_folder(run), self.run_folder(run) / "begun.json"
        before = _key(mark)
        if before != key:
            if folder.exists():
                shutil.rmtree(folder)
            write_json(mark, {"key": key})
        return folder


def publish(study: str, common: Mapping[str, Any], command: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append those ``rows`` to ``results/paper.csv`` that are not there yet: a kill may fall between two."""
    there = {_identity(row) for row in read_rows() if row["study"] == study}
    for row in rows:
        full = dict.fromkeys(COLUMNS, "") | {"study": study} | dict(common) | dict(row)
        if unknown := set(full) - set(COLUMNS):
            raise ValueError(f"row with the columns {sorted(unknown)}; expected some of {COLUMNS}")
        if _identity(full) not in there:
            record.append_row(RESULTS, command, full)


def read_rows() -> list[dict[str, str]]:
    """All rows of ``results/paper.csv``; none where there is no such file."""
    path = record.RESULTS / f"{RESULTS}.csv"
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    missing = set(COLUMNS) - set(rows[0]) if rows else set()
    if missing:
        raise ArtefactError(f"{path}: lacks the column {sorted(missing)[0]!r}; expected rows of this program")
    return rows


def _identity(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in ("experiment", "variant", "seed", "proposals"))


def _key(path: Path) -> str | None:
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["key"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _difference(before: Any, now: Any, path: str = "") -> str:
    """Where two plain values differ first, as one short text."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in {**before, **now}:
            if before.get(name) != now.get(name):
                return _difference(before.get(name), now.get(name), f"{path}.{name}")
    return f"{before!r}, now {now!r}" + (f" at {path.removeprefix('.')}" if path else "")
