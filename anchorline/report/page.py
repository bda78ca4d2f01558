"""The page: its sections, and the one file that they make together."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from anchorline import __version__
from anchorline.report.markup import (
    Html,
    facts,
    join,
    legend,
    line_chart,
    number,
    picture,
    shaded,
    stacked_bar,
    table,
    tag,
    text,
    thinned,
)
from anchorline.report.sources import (
    BenchRow,
    ClassFigures,
    Confusion,
    Curves,
    Evaluated,
    Evaluation,
    Recall,
    Sources,
    Training,
    Verification,
    gather,
)
from anchorline.runtime.io.errors import AnchorlineError, SettingsError
from anchorline.runtime.io.files import atomic_write_text
from anchorline.runtime.io.images import read_image

# What is shown of long lists; the JSON has the rest.
_MOST_CLASSES = 200
_MOST_CURVES = 24
_MOST_CONFUSED = 20
_MOST_PAIRS = 20
_MOST_ROWS = 50
_LONGEST_CONTRACT = 200_000
_SMOOTHING = 25  # steps over which the drawn loss is averaged


@dataclass(frozen=True)
class WrittenReport:
    """Where the page is, and what it could not tell: names of missing parts and the commands for them."""

    path: Path
    bytes: int
    missing: tuple[tuple[str, str], ...]
    left_out: tuple[str, ...]


def report(
    target: str | Path,
    out: str | Path | None = None,
    *,
    evaluations: Sequence[str | Path] = (),
    verifications: Sequence[str | Path] = (),
    benches: Sequence[str | Path] = (),
    training: str | Path | None = None,
) -> WrittenReport:
    """Write the page about ``target``, a model's file or a folder with one, to ``out``.

    By default ``report.html`` beside the model. The other arguments as in ``sources.gather``. Nothing is
    measured. Raises ``AnchorlineError``.
    """
    if out is not None and Path(out).suffix.lower() not in (".html", ".htm"):  # the model's own name, say
        raise SettingsError(f"{out}: is no name of a page; expected one that ends in .html")
    found = gather(
        Path(target),
        [Path(path) for path in evaluations],
        [Path(path) for path in verifications],
        [Path(path) for path in benches],
        None if training is None else Path(training),
    )
    path = found.artefact.path.with_name("report.html") if out is None else Path(out)
    content = render(found)
    atomic_write_text(path, content)
    return WrittenReport(path, len(content.encode()), tuple(found.missing()), tuple(found.left_out))


def render(found: Sources) -> str:
    """The whole page: no script, one style that its policy knows by its hash, pictures as data."""
    style = files("anchorline.report").joinpath("style.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    )
    sections = [
        ("model", "The model", _model(found)),
        ("accuracy", "Accuracy", join(map(_evaluation, found.evaluations))),
        ("parity", "Parity", join(_verification(each) for each in found.verifications)),
        ("speed", "Speed", join(map(_bench, found.bench[:_MOST_ROWS]))),
        ("training", "Training", _training(found.training) if found.training else Html()),
        ("missing", "What is not here", _missing(found)),
    ]
    sections = [section for section in sections if section[2]]
    links = (tag("li", tag("a", title, href=f"#{key}")) for key, title, _ in sections)
    now = datetime.now(timezone.utc).isoformat(timespec="minutes").replace("+00:00", " UTC").replace("T", " ")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{found.name} - Anchorline report"),
        tag("style", Html(style)),
    )
    body = tag(
        "body",
        tag("header", tag("p", "Anchorline report"), tag("h1", found.name), _cards(found)),
        tag("nav", tag("ul", *links), aria_label="Sections"),
        tag(
            "main",
            *(
                tag(
                    "section",
                    tag("h2", title, id=f"{key}-title"),
                    inner,
                    id=key,
                    aria_labelledby=f"{key}-title",
                )
                for key, title, inner in sections
            ),
        ),
        tag(
            "footer", f"Written by anchorline {__version__} on {now}, from files alone: nothing was measured."
        ),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _cards(found: Sources) -> Html:
    """The few figures that one looks for first."""
    cards: list[tuple[str, str, str]] = []
    for each in found.evaluations[:1]:
        if isinstance(each.figures, Evaluation):
            cards.append((number(each.figures.map50), "mAP50", f"{each.figures.images} images"))
            cards.append((number(each.figures.map), "COCO AP .5:.95", each.figures.data or "data not stated"))
        else:
            cards.append((number(each.figures.ar), "average recall", f"{each.figures.images} images"))
    if found.verifications:
        first = found.verifications[0]
        word = {True: "agrees", False: "differs", None: "not verified"}[first.passed]
        with_ = f"with {first.reference.name}" if first.reference and first.passed is not None else "parity"
        cards.append((word, with_, first.not_executed or first.data))
    for row in found.bench[:1]:
        median = row.stages.get("total", {}).get("p50")
        cards.append((f"{number(median, 1)} ms", f"median of a batch of {row.batch}", _where(row)))
        cards.append((number(row.fps, 1), "frames a second", f"frames of {row.frame_size}"))
    contract = found.artefact.contract
    cards.append((str(len(contract.names)), "classes", contract.task))
    return tag(
        "div",
        *(
            tag("div", tag("strong", value), tag("span", name), tag("small", note), class_="card")
            for value, name, note in cards
        ),
        class_="cards",
    )


def _where(row: BenchRow) -> str:
    return f"{row.provider}, {row.precision}, {row.threads} threads"


def _model(found: Sources) -> Html:
    """What the file promises, where it comes from, and the engine's build."""
    artefact, contract = found.artefact, found.artefact.contract
    rule, cuts = contract.resize, contract.thresholds
    bounds = [
        f"shorter side at most {rule.shorter_side}" if rule.shorter_side else None,
        f"longer side at most {rule.longer_side}" if rule.longer_side else None,
        "within {}x{} (height x width)".format(*rule.within) if rule.within else None,
        None if contract.canvas else f"canvas sides in multiples of {rule.padding}",
        f"{rule.interpolation}, rounded {rule.rounding}",
    ]
    rows: list[tuple[object, object]] = [
        *artefact.rows().items(),
        ("file's SHA-256", tag("code", found.sha256)),
        ("resize rule", "; ".join(filter(None, bounds))),
        (
            "mean, std",
            f"{_list(contract.mean)}; {_list(contract.std)} ({contract.channel_order}, inside the graph)",
        ),
        (
            "thresholds",
            f"score {cuts.score:g}, NMS {cuts.nms_iou:g}, at most {cuts.max_detections} detections; RPN NMS "
            f"{cuts.rpn_nms_iou:g}, {cuts.max_proposals} proposals",
        ),
    ]
    stated = json.dumps(dataclasses.asdict(contract), indent=1, ensure_ascii=False)
    parts = [facts(rows)]
    if artefact.engine is not None:
        parts += [tag("h3", "The build of the engine"), facts(_build(artefact.engine.raw))]
    names = tag("ol", *(tag("li", name) for name in contract.names[:_MOST_CLASSES]), class_="names", start=0)
    more = len(contract.names) - _MOST_CLASSES
    rest = tag("p", f"and {more} more", class_="note") if more > 0 else Html()
    parts.append(tag("details", tag("summary", f"All {len(contract.names)} classes"), names, rest))
    whole = tag("pre", join(text(line) + "\n" for line in _lines(stated)), tabindex="0")
    parts.append(tag("details", tag("summary", "The contract as it stands in the file"), whole))
    return join(parts)


def _lines(stated: str) -> list[str]:
    cut = [stated[:_LONGEST_CONTRACT], "..."] if len(stated) > _LONGEST_CONTRACT else [stated]
    return "\n".join(cut).splitlines()


def _list(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.6g}" for value in values)


def _build(raw: dict[str, Any]) -> Iterator[tuple[object, object]]:
    """What a manifest says of its build beyond the rows of ``Artefact``; free text of a file, so any JSON."""
    for name, key in (
        ("built on GPU", "gpu"),
        ("anchorline", "anchorline"),
        ("seconds", "build_seconds"),
        ("activation memory, bytes", "activation_bytes"),
        ("profiles", "profiles"),
        ("plugins", "plugins"),
        ("half precision", "precision_report"),
        ("options", "options"),
        ("ONNX file", "onnx"),
        ("warnings", "warnings"),
    ):
        value = raw.get(key)
        if value not in (None, [], {}, ""):
            yield name, value if isinstance(value, str | int | float) else tag("code", json.dumps(value))


def _evaluation(each: Evaluated) -> Html:
    figures = each.figures
    data = figures.data or "data that is not stated"
    made = f"{figures.images} images of {data}; {figures.provider}, {figures.precision}"
    if figures.slices:
        made += f"; in slices: {json.dumps(figures.slices)}"
    remarks = []
    if each.of:
        remarks.append(f"Measured with {each.of}, the reference that this file agrees with.")
    if figures.model is None:
        remarks.append(
            "The figures do not say of which file they are: written by an older version, or in Python."
        )
    notes = [tag("p", remark, class_="note") for remark in remarks]
    body = _recall(figures) if isinstance(figures, Recall) else _accuracy(each, figures)
    return tag("article", tag("h3", made), *notes, body)


def _accuracy(each: Evaluated, figures: Evaluation) -> Html:
    parts = [_class_table(figures)]
    if figures.per_size:
        rows = [
            (name, _count(size.objects), shaded(size.map50), shaded(size.map))
            for name, size in list(figures.per_size.items())[:10]
        ]
        parts.append(table("By size of the object (COCO's classes)", ("size", "objects", "AP50", "AP"), rows))
    if each.curves:
        parts.append(_curves(each.curves))
    if each.confusion:
        parts.append(_confusion(each.confusion))
    if each.worst and each.sheet:
        shown = [
            f"{one.image}: {one.missed} missed, {one.false_positives} false" for one in each.worst.images[:50]
        ]
        caption = (
            f"The images with the most errors, from a score of {each.worst.min_score:g} on: ground truth "
            "left with what was missed, detections right with what is false."
        )
        try:
            inner = picture(
                read_image(each.sheet), f"Contact sheet of {len(shown)} images: {'; '.join(shown)}"
            )
        except AnchorlineError as error:
            inner = tag("p", f"The picture cannot be read: {error}", class_="note")
        figure = tag("figure", inner, tag("figcaption", caption))
        parts += [
            tag("h4", "The worst images"),
            figure,
            tag("ul", *(tag("li", one) for one in shown), class_="names"),
        ]
    return join(parts)


def _count(value: int) -> Html:
    return tag("td", f"{value:,}", class_="num")


def _class_table(figures: Evaluation) -> Html:
    classes = list(figures.per_class.items())
    shown = classes[:_MOST_CLASSES]

    def cells(name: object, one: ClassFigures) -> tuple[object, ...]:
        return name, _count(one.objects), *map(shaded, (one.ap50, one.voc07, one.ap))

    objects = sum(one.objects for _, one in classes)
    mean = cells("mean", ClassFigures(figures.map50, figures.voc07, figures.map, objects))
    cut = f", the first {len(shown)} of {len(classes)}" if len(shown) < len(classes) else ""
    columns = ("class", "objects", "AP50", "VOC07", "AP .5:.95")
    return table(
        f"Average precision by class{cut}", columns, [*(cells(*each) for each in shown), mean], last_bold=True
    )


def _curves(curves: Curves) -> Html:
    """A small chart for each class; of too many classes those that are found worst."""
    known = [(name, one) for name, one in curves.classes.items() if one.objects]
    cut = ""
    if len(known) > _MOST_CURVES:
        known = sorted(known, key=lambda each: each[1].ap50 or 0.0)[:_MOST_CURVES]
        cut = f" The {_MOST_CURVES} classes with the lowest AP50 of {len(curves.classes)}."
    charts = []
    for name, one in known:
        points = thinned([0.0, *one.recall], [*one.precision[:1], *one.precision]) if one.recall else []
        title = f"{name}: AP50 {number(one.ap50)}, {one.objects} objects"
        chart = line_chart(
            [(name, points)],
            title=f"Precision over recall of {title}",
            labels=("recall", "precision"),
            size=(220, 165),
            limits=(1.0, 1.0),
        )
        charts.append(tag("figure", chart, tag("figcaption", title)))
    note = tag("p", f"Precision over recall at IoU {curves.iou_threshold:g}.{cut}", class_="note")
    return join([tag("h4", "Precision and recall"), note, tag("div", *charts, class_="charts")])


def _confusion(confusion: Confusion) -> Html:
    """The matrix where it can be read; of any size the pairs that are confused most."""
    names, counts = confusion.names, confusion.counts
    if len(counts) != len(names) or any(len(row) != len(names) for row in counts):
        return tag("p", "The confusion matrix is damaged: its sides differ from its names.", class_="note")
    parts = [tag("h4", "Confusion")]
    about = f"scores from {confusion.min_score:g} on, IoU from {confusion.iou_threshold:g} on"
    if len(names) <= _MOST_CONFUSED + 1:
        rows = []
        for name, row in zip(names, counts, strict=True):
            total = sum(row) or 1
            rows.append((name, *(shaded(count / total, f"{count:,}") for count in row)))
        caption = f"Objects by class (rows) and what was detected there (columns); {about}"
        parts.append(table(caption, ("object", *names), rows))
    background = len(names) - 1
    pairs = sorted(
        ((count, i, j) for i, row in enumerate(counts) for j, count in enumerate(row) if count and i != j),
        reverse=True,
    )[:_MOST_PAIRS]
    rows = [
        (
            "nothing" if i == background else names[i],
            "missed" if j == background else names[j],
            _count(count),
        )
        for count, i, j in pairs
    ]
    if rows:
        parts.append(table(f"The most frequent errors; {about}", ("object", "detected as", "times"), rows))
    return join(parts)


def _recall(figures: Recall) -> Html:
    counts = list(figures.recall.items())[:_MOST_ROWS]
    ious = list(counts[0][1])[:12] if counts else []
    rows = [(f"{count} proposals", *(shaded(by_iou.get(iou)) for iou in ious)) for count, by_iou in counts]
    average = number(figures.ar)
    caption = (
        f"Recall of {figures.objects:,} objects by number of proposals and IoU; average recall {average}"
    )
    return table(caption, ("at most", *(f"IoU {iou}" for iou in ious)), rows)


def _mark(passed: bool | None) -> Html:
    word, kind = {True: ("ok", "good"), False: ("differs", "bad"), None: ("-", "none")}[passed]
    return tag("td", tag("span", word, class_=f"mark {kind}"))


def _verification(each: Verification) -> Html:
    sides = " and ".join(
        f"{side.name} ({', '.join(filter(None, (side.provider, side.precision)))})"
        if side.provider
        else side.name
        for side in (each.reference, each.artefact)
        if side is not None
    )
    verdict = {
        True: "The numbers held.",
        False: f"They differ, first in {each.first_divergence}.",
        None: "Not verified: ",
    }
    said = verdict[each.passed] + (
        each.not_executed or "the reason is not stated" if each.passed is None else ""
    )
    kind = {True: "good", False: "bad", None: "none"}[each.passed]
    made = ", ".join(filter(None, (each.date, each.anchorline and f"anchorline {each.anchorline}")))
    parts = [tag("h3", sides), tag("p", said, class_=f"verdict {kind}")]
    rows: list[tuple[object, ...]] = []
    for stage in (each.stages or [])[:_MOST_ROWS]:
        used = stage.tolerance_used if stage.compared else None
        share = "-" if used is None else f"{100 * used:.2g} %"
        rows.append(
            (
                stage.name,
                _mark(stage.passed if stage.compared else None),
                tag("td", share, class_="num"),
                stage.detail,
            )
        )
    if each.stages is None and each.stages_note:
        rows.append(("stages", _mark(None), "", each.stages_note))
    if one := each.detections:
        detail = (
            f"{one.matched} matched, {one.differing} differ, {one.missed} missed, {one.extra} extra, "
            f"{one.borderline + one.nms_ties} excused as ties; boxes within {_short(one.max_box_error)} px, "
            f"scores within {_short(one.max_score_error)}"
        )
        detail += (
            f"; {reason}" if (reason := one.loss or (None if one.passed else one.first_disagreement)) else ""
        )
        rows.append((f"detections, {one.images} images", _mark(one.passed), "", detail))
    rows += [(f"trap: {trap.name}", _mark(trap.passed), "", trap.detail) for trap in each.traps[:_MOST_ROWS]]
    if rows:
        on = f"Compared on {each.data}" + (f", {made}" if made else "")
        parts.append(table(on, ("part", "holds", "of the tolerance", "what was found"), rows))
    elif made:
        parts.append(tag("p", made, class_="note"))
    if one and one.accuracy:
        parts.append(_both_accuracies(one.accuracy))
    parts += [tag("p", note, class_="note") for note in each.notes[:_MOST_ROWS]]
    return tag("article", *parts)


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def _both_accuracies(accuracy: dict[str, dict[str, dict[str, float | None]]]) -> Html:
    rows = []
    for name, figures in list(accuracy.items())[:_MOST_CLASSES]:
        cells = [
            number(figures.get(key, {}).get(side), 4)
            for key in ("ap50", "recall")
            for side in ("reference", "candidate")
        ]
        rows.append((name, *(tag("td", cell, class_="num") for cell in cells)))
    columns = ("class", "AP50, reference", "AP50, this file", "recall, reference", "recall, this file")
    return table("On labelled images", columns, rows)


def _bench(row: BenchRow) -> Html:
    stages = {name: times for name, times in list(row.stages.items())[:_MOST_ROWS] if name != "total"}
    medians = [(name, times.get("p50", 0.0)) for name, times in stages.items()]
    quantities = list(next(iter(row.stages.values()), {}))[:8]
    rows = [
        (name, *(tag("td", number(times.get(q), 2), class_="num") for q in quantities))
        for name, times in stages.items()
    ]
    rows.append(
        (
            "total",
            *(tag("td", number(row.stages.get("total", {}).get(q), 2), class_="num") for q in quantities),
        )
    )
    about: list[tuple[object, object]] = [
        ("frames a second", number(row.fps, 1)),
        (
            "frames",
            f"{row.frames} of {row.frame_size}, {row.batch} in a batch"
            + (f", each in {row.views:g} views" if row.views != 1 else ""),
        ),
        ("opened in, first batch", f"{number(row.open_s, 2)} s, {number(row.first_ms, 1)} ms"),
        ("peak memory", f"{number(row.peak_mib, 0)} MiB, {number(row.base_mib, 0)} of them before the model"),
        *list(row.machine.items())[:_MOST_ROWS],
    ]
    return tag(
        "article",
        tag("h3", _where(row)),
        stacked_bar(medians, "Median of each stage"),
        legend([f"{name} {value:.1f} ms" for name, value in medians], "f"),
        table("Milliseconds a batch, frames to boxes", ("stage", *quantities), rows, last_bold=True),
        facts(about),
    )


def _training(training: Training) -> Html:
    """The losses over the steps, smoothed, and the validation's figure where there is one."""
    columns, lines = training.columns, []
    for name in sorted((n for n in columns if n.startswith("loss")), key=lambda n: (n != "loss", n))[:8]:
        steps, values = columns[name]
        if len(values):
            sums, ends = np.cumsum([0.0, *values]), np.arange(1, len(values) + 1)
            starts = np.maximum(0, ends - _SMOOTHING)
            lines.append(
                (name, thinned(steps.tolist(), ((sums[ends] - sums[starts]) / (ends - starts)).tolist()))
            )
    drawn = [point for _, points in lines for point in points]
    if not drawn:
        return Html()
    limits = max(x for x, _ in drawn), max(y for _, y in drawn)
    charts = [_chart("Loss over the steps of the training", "loss", lines, limits)]
    for name in ("map50", "recall50"):
        if name in columns and columns[name].size:
            points = thinned(*columns[name].tolist())
            charts.append(_chart(f"Validation: {name}", name, [(name, points)], (limits[0], 1.0)))
    return tag("div", *charts, class_="charts wide")


def _chart(
    title: str, label: str, lines: list[tuple[str, list[tuple[float, float]]]], limits: tuple[float, float]
) -> Html:
    chart = line_chart(lines, title=title, labels=("step", label), size=(520, 280), limits=limits)
    names = [name.removeprefix("loss_").replace("_", " ") for name, _ in lines]
    return tag("figure", chart, legend(names, "l"), tag("figcaption", title))


def _missing(found: Sources) -> Html:
    parts = []
    if missing := found.missing():
        rows = (
            tag("li", f"{what}: not measured, or not found beside the model. ", tag("code", how))
            for what, how in missing
        )
        parts.append(tag("ul", *rows))
    if found.left_out:
        parts.append(tag("p", "Found and not shown:"))
        parts.append(tag("ul", *(tag("li", reason) for reason in found.left_out)))
    return join(parts)
