"""The experiments of the Faster R-CNN paper (TPAMI version, section 4.1) on any VOC-format data.

    python benchmarks/paper.py --state runs/paper --budget 120
    python benchmarks/paper.py --state runs/paper --budget 120      after a kill: it goes on
    python benchmarks/paper.py --report benchmarks/reports/paper.md --plots benchmarks/reports/images

Without ``--data`` it is BCCD, and the weights are MobileNetV2's, in the folder that ``ANCHORLINE_SHARED``
names. The plan with the epochs of each training is written first, by what a step costs here. A row a
measurement goes to ``results/paper.csv``, all of them with plan and recall curves to ``results/paper.json``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import record
import torch
from paper_experiments.clock import BudgetSpent, Clock
from paper_experiments.costs import LEAST, fixed_epochs, measure_costs, plan_epochs
from paper_experiments.measuring import Sitting, execute
from paper_experiments.plots import plot_proposals, plot_recall
from paper_experiments.report import PICTURES, fill, report
from paper_experiments.runs import EXPERIMENTS, Run
from paper_experiments.state import RESULTS, Result, State, publish, read_rows
from paper_experiments.study import DEFAULT_PRESET, Study, open_study

from anchorline.runtime.io.errors import AnchorlineError, DataError, SettingsError
from anchorline.runtime.io.files import write_json

USER_ERROR, INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, or go on, or report; 2 for what the user can mend, 130 for an interruption."""
    options = _parser().parse_args(arguments)
    try:
        if options.report is not None:
            _report(options)
            return 0
        return run_study(options)
    except AnchorlineError as error:
        print(f"paper.py: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("paper.py: interrupted; the same command goes on", file=sys.stderr)
        return INTERRUPTED


def run_study(options: argparse.Namespace) -> int:
    """All runs of the plan that are left, until the budget is spent."""
    if options.state is None:
        raise SettingsError("no --state given; expected a folder, such as --state runs/paper")
    if not options.budget > 0:
        raise SettingsError(f"--budget is {options.budget:g}; expected minutes above 0")
    if options.epochs is not None and options.epochs < LEAST:
        raise SettingsError(
            f"--epochs is {options.epochs}; expected at least {LEAST}, one a step of alternating training"
        )
    if len(set(options.seeds)) < len(options.seeds) or min(options.seeds) < 0:
        raise SettingsError(f"--seeds is {options.seeds}; expected whole numbers from 0 on, each once")
    clock = Clock(options.state / "spent.json", 60 * options.budget)
    study, state = open_study(options), State(options.state)
    plan = state.plan(_described(study, options)) or _make_plan(options, study, state, clock)
    _show(plan, study)
    if options.plan_only:
        return 0
    sitting = Sitting(study, int(plan["epochs"]), clock, options.state)
    done: dict[Run, Result] = {}
    try:
        _execute_all(sitting, state, plan, done, options)
    except BudgetSpent:
        left = len(plan["runs"]) - len(done)
        print(
            f"the budget of {options.budget:g} minutes is spent, {left} runs are left; a larger one goes on"
        )
    finally:
        clock.note()
        _summarise(plan, study, done)
    return 0


def _execute_all(
    sitting: Sitting, state: State, plan: dict[str, Any], done: dict[Run, Result], options: argparse.Namespace
) -> None:
    keys: dict[str, str] = {}
    for run in plan["runs"]:
        key = sitting.study.key(run, sitting.epochs, [keys[name] for name in run.needs])
        keys[run.name] = key
        result = state.finished(run, key)
        if result is None:
            sitting.clock.check()
            print(f"{run.name} ...", file=sys.stderr)
            state.begin(run, key)
            result = execute(sitting, run)
            state.finish(run, key, result)
            _tell(run, result, sitting.clock)
        publish(plan["id"], _common(sitting.study), _command(options), result.rows)
        done[run] = result


def _described(study: Study, options: argparse.Namespace) -> dict[str, Any]:
    """What a later sitting has to agree with; the budget may be another one."""
    return {**study.describe(), "seeds": options.seeds, "only": options.only, "epochs": options.epochs}


def _make_plan(options: argparse.Namespace, study: Study, state: State, clock: Clock) -> dict[str, Any]:
    print("measuring what a step costs", file=sys.stderr)
    costs = measure_costs(study)
    if options.epochs is not None:
        schedule = fixed_epochs(study, costs, options.seeds, options.only, options.epochs)
    else:
        left = 60 * options.budget - clock.spent
        schedule = plan_epochs(study, costs, left, options.seeds, options.only, options.wanted_epochs)
    clock.note()
    described = _described(study, options)
    content = {"study": described, "budget_min": options.budget, "costs": dataclasses.asdict(costs)}
    state.write_plan({**content, **dataclasses.asdict(schedule), "scales": study.scales})
    plan = state.plan(described)
    assert plan is not None
    return plan


def _show(plan: dict[str, Any], study: Study) -> None:
    """The plan on stdout, before anything is trained."""
    runs, minutes = plan["runs"], (plan["training_s"] / 60, plan["evaluation_s"] / 60)
    print(
        f"study {plan['id']}: {len(runs)} runs, {sum(run.trains for run in runs)} of them trainings of "
        f"{plan['epochs']} epochs on {len(study.train_data)} images, {plan['costs']['step_s']:.2f} s a step; "
        f"anchors of {', '.join(f'{size:g}' for size in study.scales)} canvas pixels; anchors and lambda on "
        f"seeds {', '.join(map(str, plan['sweep_seeds']))}; about {minutes[0]:.0f} minutes of training and "
        f"{minutes[1]:.0f} of measuring",
        flush=True,
    )


def _tell(run: Run, result: Result, clock: Clock) -> None:
    shown = [f"{row['variant']} {100 * row['voc07']:.1f}".strip() for row in result.rows if row.get("voc07")]
    notes = [row["note"] for row in result.rows[:1] if row.get("note") and not shown]
    print(f"{clock.spent / 60:6.1f} min  {run.name}: {', '.join(shown + notes) or 'measured'}", flush=True)


def _common(study: Study) -> dict[str, Any]:
    """The columns that all rows of a study share."""
    height, width = study.model.canvas
    name = Path(study.train_data.spec.partition(":")[2].rpartition("@")[0]).name
    splits = [each.spec.rpartition("@")[2] for each in (study.train_data, study.test_data)]
    return {
        "data": f"{name} {splits[0]}, {splits[1]}",
        "images": f"{len(study.train_data)} + {len(study.test_data)}",
        "preset": Path(study.preset).name,
        "canvas": f"{height}x{width}",
        "device": study.device.type,
        "threads": torch.get_num_threads(),
    }


def _command(options: argparse.Namespace) -> str:
    """The command without the folders of this machine."""
    parts = [
        "python",
        "benchmarks/paper.py",
        "--budget",
        f"{options.budget:g}",
        "--seeds",
        *map(str, options.seeds),
    ]
    if options.data:
        scheme, _, folder = options.data.partition(":")
        parts += ["--data", f"{scheme}:{Path(folder).name}"]
    for name in ("train_split", "test_split", "preset", "backbone_weights"):
        parts += [f"--{name.replace('_', '-')}", Path(getattr(options, name)).name]
    parts += ["--scales", *options.scales, *(part for each in options.overrides for part in ("--set", each))]
    return shlex.join([*parts, *(() if options.epochs is None else ("--epochs", str(options.epochs)))])


def _summarise(plan: dict[str, Any], study: Study, done: dict[Run, Result]) -> None:
    """``results/paper.json``: the plan in short, all rows, and the recall curves by source, one a seed."""
    curves: dict[str, list[Any]] = {}
    for result in done.values():
        for name, curve in result.curves.items():
            curves.setdefault(name, []).append(curve)
    missing = [run.name for run in plan["runs"] if run not in done]
    short = {name: plan[name] for name in ("epochs", "sweep_seeds", "scales", "costs", "budget_min")}
    rows = [row for result in done.values() for row in result.rows]
    content = {"study": plan["id"], **_common(study), "plan": short, "missing_runs": missing}
    write_json(record.RESULTS / f"{RESULTS}.json", {**content, "rows": rows, "curves": curves})


def _report(options: argparse.Namespace) -> None:
    """The pictures, and the tables on stdout or in a document, which then shows the pictures."""
    folder = Path(options.report).parent if options.report else Path()
    pictures = None if options.plots is None else Path(os.path.relpath(options.plots, folder)).as_posix()
    text = report(options.study, pictures)
    if options.plots is not None:
        _draw(options.plots, options.study or read_rows()[-1]["study"])
    if options.report:
        fill(Path(options.report), text)
    else:
        print(text, end="")


def _draw(folder: Path, study: str) -> None:
    summary = _summary()
    if study != summary["study"]:
        raise DataError(f"paper.json holds the curves of study {summary['study']}; expected those of {study}")
    recall, proposals = PICTURES
    plot_recall(summary["curves"], folder / recall)
    plot_proposals([row for row in read_rows() if row["study"] == study], folder / proposals)


def _summary() -> dict[str, Any]:
    path = record.RESULTS / f"{RESULTS}.json"
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return {"curves": content["curves"], "study": content["study"]}
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: cannot be read ({error!r}); run benchmarks/paper.py first") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", metavar="voc:DIR", help="without a split; default: BCCD in $ANCHORLINE_SHARED")
    add("--train-split", default="trainval")
    add("--test-split", default="test")
    add("--preset", default=DEFAULT_PRESET, help="its backbone and recipe; the neck is one map of stride 16")
    add("--backbone-weights", default="auto", metavar="FILE|imagenet|auto|none")
    add("--set", dest="overrides", action="append", default=[], metavar="NAME=VALUE")
    add("--scales", nargs="+", default=["auto"], metavar="auto|PIXELS", help="anchor sizes on the canvas")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    add("--step-shares", type=float, nargs=4, default=[1.0, 2.0, 2.0, 1.0], help="of alternating's epochs")
    add("--budget", type=float, default=120.0, metavar="MINUTES", help="for the whole, all sittings together")
    add("--epochs", type=int, help=f"of each training, instead of what the budget leaves; at least {LEAST}")
    add("--wanted-epochs", type=int, default=12, help="below this, anchors and lambda lose seeds")
    add(
        "--selective-search",
        type=Path,
        metavar="FILE",
        help="stored proposals of all images (anchorline proposals)",
    )
    add("--device", default="auto")
    add("--state", type=Path, metavar="DIR", help="plan, models and markers; what is finished there stays")
    add("--plan-only", action="store_true", help="write and show the plan, train nothing")
    add(
        "--report",
        nargs="?",
        const="",
        metavar="DOC",
        help="tables from the rows, into DOC between its marks",
    )
    add("--study", help="report this one instead of the last")
    add("--plots", type=Path, metavar="DIR", help="with --report: draw the pictures there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
