"""``--report``: the rows as the tables of benchmarks/reports/paper.md, ours beside the paper's numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from anchorline.runtime.io.errors import DataError
from anchorline.runtime.io.files import atomic_write_text
from paper_experiments.published import CLOSE, TABLES, TIMES, Line, Table, Trend
from paper_experiments.state import RESULTS, read_rows

BEGIN, END = "<!-- paper.py: begin -->", "<!-- paper.py: end -->"
PICTURES = {
    "paper-recall.png": "Recall against IoU by number of proposals",
    "paper-proposals.png": "mAP against test proposals",
}
Rows = Sequence[dict[str, str]]


def report(study: str | None = None, pictures: str | None = None) -> str:
    """The tables of one study, by default that of the last row; raises ``DataError`` where there is none.

    With ``pictures``, a folder as the document names it, those of ``plots.py`` stand at the end.
    """
    rows = read_rows()
    if not rows:
        raise DataError(f"results/{RESULTS}.csv holds no rows; run benchmarks/paper.py first")
    wanted = study or rows[-1]["study"]
    chosen = [row for row in rows if row["study"] == wanted]
    if not chosen:
        known = ", ".join(dict.fromkeys(row["study"] for row in rows))
        raise DataError(f"study {wanted!r} has no row in results/{RESULTS}.csv; expected one of {known}")
    parts = [_heading(chosen), *(_table(each, chosen) for each in TABLES), _recall(chosen), _times(chosen)]
    parts += [f"![{name}]({pictures}/{file})" for file, name in PICTURES.items()] if pictures else []
    return "\n\n".join(part for part in parts if part) + "\n"


def fill(document: Path, text: str) -> None:
    """Put ``text`` between the two marks in ``document``; raises ``DataError`` where they are missing."""
    try:
        content = document.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{document}: cannot be read ({error}); expected a Markdown file") from None
    before, begin, rest = content.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise DataError(f"{document}: lacks the lines {BEGIN} and {END}; expected them where the tables go")
    atomic_write_text(document, f"{before}{BEGIN}\n\n{text}\n{END}{after}")


def _heading(rows: Rows) -> str:
    row = rows[0]
    commits = ", ".join(dict.fromkeys(each["commit"] for each in rows))
    seeds = sorted({int(each["seed"]) for each in rows})
    epochs = next((each["epochs"] for each in rows if each["experiment"] == "joint"), row["epochs"])
    return (
        f"Data: {row['data']} ({row['images']} images). Model: `{row['preset']}`, canvas {row['canvas']}; "
        f"{epochs} epochs a training; seeds {', '.join(map(str, seeds))}; {row['device']}, {row['threads']} "
        f"threads, {row['processor']}; {row['date']}, commit {commits}, study {row['study']}. Figures "
        "are means over the seeds in %, with the lowest and the highest; VOC07 is the 11-point mAP that the "
        "paper gives, mAP50 the area under the curve."
    )


def _table(table: Table, rows: Rows) -> str:
    columns = ["", "epochs", "seeds", "VOC07", "mAP50", *(["recall at 0.5, 0.7"] if table.recall else [])]
    lines = [[*columns, "paper, VOC07"]]
    for line in table.lines:
        found = _of(line, rows)
        cells = [
            line.label,
            _epochs(found),
            str(sum(bool(row["voc07"]) for row in found) or "-"),
            _percent(found, "voc07"),
            _percent(found, "map50"),
        ]
        if table.recall:
            cells.append(_recalls(found))
        lines.append([*cells, line.paper])
    notes = dict.fromkeys(row["note"] for line in table.lines for row in _of(line, rows) if row["note"])
    text = [f"### {table.title}", _markdown(lines)]
    text += [f"- {_trend(trend, table, rows)}" for trend in table.trends]
    said = [table.comparable, *(f"Note: {note}." for note in notes)]
    return "\n\n".join([*text[:2], "\n".join(text[2:]), " ".join(said)])


def _of(line: Line, rows: Rows) -> list[dict[str, str]]:
    return [
        row
        for row in rows
        if row["experiment"] == line.experiment
        and row["variant"] == line.variant
        and line.proposals in ("", row["proposals"])
    ]


def _by_seed(label: str, table: Table, rows: Rows) -> dict[str, float]:
    (line,) = (each for each in table.lines if each.label == label)
    return {row["seed"]: 100 * float(row["voc07"]) for row in _of(line, rows) if row["voc07"]}


def _trend(trend: Trend, table: Table, rows: Rows) -> str:
    """One sentence: our difference seed by seed, the paper's, and in how many seeds its direction is seen."""
    first, second = (_by_seed(label, table, rows) for label in (trend.first, trend.second))
    ours = [first[seed] - second[seed] for seed in first if seed in second]
    what = f"{trend.first} minus {trend.second}: "
    if not ours:
        return f"{what}not measured; the paper {trend.paper}."
    if trend.sign:
        holds = sum(each * trend.sign > 0 for each in ours)
        verdict = f"the same direction in {holds} of {len(ours)} seeds"
    else:
        holds = sum(abs(each) < CLOSE for each in ours)
        verdict = f"close, below {CLOSE} points, in {holds} of {len(ours)} seeds"
    return f"{what}{', '.join(f'{each:+.1f}' for each in ours)}; the paper {trend.paper}: {verdict}."


def _recall(rows: Rows) -> str:
    """Recall at two overlaps by number of proposals, one line for each source of proposals."""
    found = [row for row in rows if row["experiment"] == "recall"]
    if not found:
        return ""
    counts = sorted({int(row["proposals"]) for row in found})
    lines = [["recall at IoU 0.5, 0.7", *map(str, counts)]]
    for name in dict.fromkeys(row["variant"] for row in found):
        cells = [
            _recalls([row for row in found if (row["variant"], row["proposals"]) == (name, str(count))])
            for count in counts
        ]
        lines.append([name, *cells])
    return f"### Recall by number of proposals (figure 4)\n\n{_markdown(lines)}"


def _times(rows: Rows) -> str:
    lines = [["", "convolutions", "proposals", "region-wise", "sum, ms"]]
    for row in (each for each in rows if each["experiment"] == "timing" and each["conv_ms"]):
        conv, rpn, selection, region = (
            float(row[f"{name}_ms"]) for name in ("conv", "rpn", "selection", "region")
        )
        lines.append(
            [
                f"ours, PyTorch, {row['processor']}, {row['threads']} threads",
                *(f"{conv:.1f}", f"{rpn:.1f} + {selection:.1f}", f"{region:.1f}"),
                f"{conv + rpn + selection + region:.1f}",
            ]
        )
    if len(lines) == 1:
        return ""
    table = _markdown([*lines, *map(list, TIMES)])
    return (
        f"### Time per image (table 5)\n\n{table}\n\nOurs are medians of one warm image at a time; proposals "
        "are the RPN's layers + decoding, ranking and NMS, which the paper counts as region-wise. Processor, "
        "backbone and image size differ: only the shares of the parts can be set side by side."
    )


def _epochs(rows: Rows) -> str:
    found = sorted({row["epochs"] for row in rows if row["epochs"]})
    return ", ".join(found) or "-"


def _percent(rows: Rows, name: str) -> str:
    values = [100 * float(row[name]) for row in rows if row[name]]
    if not values:
        return "-"
    spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
    return f"{mean(values):.1f}{spread}"


def _recalls(rows: Rows) -> str:
    values = [[100 * float(row[name]) for row in rows if row[name]] for name in ("recall50", "recall70")]
    return ", ".join(f"{mean(each):.1f}" for each in values) if all(values) else "-"


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    head, *body = lines
    return "\n".join(
        f"| {' | '.join(cells)} |" for cells in (head, ["---", *["---:"] * (len(head) - 1)], *body)
    )
