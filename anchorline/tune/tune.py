"""Tuning as a whole: from a model, labelled images and a goal to a report and a file that keeps the goal."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx

from anchorline import __version__
from anchorline.bench.bench import machine
from anchorline.data.dataset import Dataset, load_datasets
from anchorline.evaluation.evaluation import evaluate
from anchorline.export.functions import save_model
from anchorline.export.graph_settings import contract_in, proposal_counts, set_contract
from anchorline.export.quantization import quantize_dataset
from anchorline.runtime.backends.cpu_options import MOST_THREADS, has_native_bf16, usable_cores
from anchorline.runtime.backends.onnxruntime import available_providers
from anchorline.runtime.backends.openvino import has_openvino
from anchorline.runtime.contract import Contract
from anchorline.runtime.detector import Detector
from anchorline.runtime.io.errors import (
    ArtefactError,
    DataError,
    GpuError,
    ParityError,
    SettingsError,
    check_count,
    shown,
)
from anchorline.runtime.io.files import atomic_path, cache_folder, write_json
from anchorline.runtime.model_file import read_onnx
from anchorline.tune.measuring import (
    Meter,
    Record,
    Workshop,
    evaluated_first,
    fingerprint,
    only_classes,
    open_way,
    stopping,
)
from anchorline.tune.report import Row, TuneReport, plot_tuning
from anchorline.tune.search import (
    SCALES,
    Candidate,
    Figures,
    Goal,
    Way,
    candidates,
    choose,
    frontier,
    halving,
)
from anchorline.verify.verification import write_tuned

PRECISIONS = ("fp32", "bf16", "int8")
PROVIDERS = ("cpu", "openvino", "cuda")
FEWEST_IMAGES = 8
CALIBRATION_SHARE = 0.25  # of the images, where int8 is tried; they are not evaluated
CALIBRATION_MOST = 64
LARGER_FOR_INT8 = 2  # scales above the chosen one that are tried in int8 as well

Progress = Callable[..., None]


def tune(
    model: str | Path,
    data: Sequence[str],
    *,
    goal: Goal | None = None,
    classes: Sequence[str] | None = None,
    precisions: Sequence[str] = PRECISIONS,
    providers: Sequence[str] | None = None,
    threads: int | None = None,
    limit: int | None = None,
    out: str | Path | None = None,
    pictures: str | Path | None = None,
    json_file: str | Path | None = None,
    fresh: bool = False,
    progress: Progress | None = None,
) -> TuneReport:
    """Search the settings of the exported ``model`` for ``goal`` on the labelled images of ``data`` (specs).

    Tried are the scale of the frames (of a file for any frame size), how many proposals the RPN hands on and
    takes into its NMS, ``providers`` (default: those that are here), ``precisions``, threads (``threads``,
    or one for each core and half as many), and Winograd's form of the convolutions where some gain by it.
    ``classes`` are names to keep. ``limit`` takes so many of the images. With ``out`` the best is written
    there, run from the disk and published only if it keeps the goal; ``pictures`` is a plot, ``json_file``
    the figures. What an earlier call of the same model, data and machine measured is taken over, unless
    ``fresh``. Ctrl-C ends it early: the report has what there is.

    Raises ``SettingsError``, ``DataError`` and ``ArtefactError`` for what cannot be used, ``ParityError``
    where the written file does not keep the goal.
    """
    model, out = Path(model), None if out is None else Path(out)
    goal = goal or Goal()
    _check(model, out, precisions, providers, threads, limit, goal)
    contract = read_onnx(model).contract
    if contract.task != "detections":
        raise SettingsError(
            f"{model}: gives proposals; expected a model of detections, whose mAP can be told"
        )
    names = tuple(classes) if classes is not None else None
    if names is not None:
        _check_names(names, contract.names)
    notes: list[str] = []
    precisions = _precisions(model, contract, precisions, notes)
    calibrate = "int8" in precisions and contract.precision != "int8"
    ordered, calibration = _images(data, contract.names, names, limit, calibrate)
    found: dict[Candidate, Figures] = {}
    with Workshop(model, names) as workshop:
        parent = _parent(workshop, threads)
        record = Record.open(cache_folder() / "tuning", _facts(model, ordered, calibration, names), fresh)

        def tell(candidate: Candidate, images: int) -> None:
            if progress is not None:
                progress(len(found), None, f"{candidate.describe()} on {images} images")

        meter = Meter(ordered, parent, workshop.open, record, tell=tell)
        with stopping(meter) as interrupted:
            _search(workshop, meter, parent, goal, precisions, providers, threads, calibration, found, notes)
        if parent not in found:
            raise KeyboardInterrupt
        complete = {each: figures for each, figures in found.items() if figures.images == len(ordered)}
        best = None if interrupted else choose(complete, parent, goal)
        row = None if best is None else Row(best, complete[best])
        report = TuneReport(
            model=model,
            data=" ".join(data),
            images=len(ordered),
            calibration_images=len(calibration),
            goal=goal,
            machine=machine(),
            parent=Row(parent, found[parent]),
            rows=tuple(Row(each, figures) for each, figures in found.items() if each != parent),
            frontier=tuple(Row(each, complete[each]) for each in frontier(complete)),
            best=row,
            interrupted=bool(interrupted),
            notes=tuple(notes),
        )
        try:
            if out is not None and row is not None:
                written = _publish(workshop, row, report, ordered, out)
                report = dataclasses.replace(report, out=out, written=written)
        finally:
            if json_file is not None:
                write_json(json_file, report.to_json())
            if pictures is not None:
                plot_tuning(report, pictures)
    return report


def _check(
    model: Path,
    out: Path | None,
    precisions: Sequence[str],
    providers: Sequence[str] | None,
    threads: int | None,
    limit: int | None,
    goal: Goal,
) -> None:
    if model.suffix.lower() in (".safetensors", ".engine"):
        raise SettingsError(f"{model}: expected an ONNX file, as anchorline export writes it; tune that")
    if out is not None and out.suffix.lower() != ".onnx":
        raise SettingsError(f"output is {str(out)!r}; expected a file name that ends in .onnx")
    if out is not None and out.exists() and model.exists() and out.samefile(model):
        raise SettingsError(f"output {str(out)!r} is the model itself; expected another file name")
    for name, given, known in (
        ("precision", precisions, PRECISIONS),
        ("provider", providers or PROVIDERS[:1], PROVIDERS),
    ):
        wrong = [each for each in given if each not in known]
        if wrong or not given:
            raise SettingsError(
                f"{name} is {shown(wrong[0] if wrong else given)}; expected some of {', '.join(known)}"
            )
    if threads is not None:
        check_count("threads", threads, most=MOST_THREADS)
    if limit is not None:
        check_count("limit", limit, FEWEST_IMAGES)
    if not (math.isfinite(goal.max_drop) and 0 <= goal.max_drop <= 1):
        raise SettingsError(f"max drop is {100 * goal.max_drop:g}; expected points of mAP50 from 0 to 100")


def _check_names(names: tuple[str, ...], known: tuple[str, ...]) -> None:
    wrong = [name for name in names if name not in known]
    if wrong or not names or len({*names}) < len(names):
        raise SettingsError(
            f"classes are {shown(names)}; expected names of the model, each once: {shown(known)}"
        )


def _precisions(model: Path, contract: Contract, wanted: Sequence[str], notes: list[str]) -> tuple[str, ...]:
    """Those of ``wanted`` that the file can be run in: it is what it is in 8 bits, or in Winograd's form."""
    if contract.precision == "int8":
        return ("int8",)
    if not contract.winograd:
        return tuple(wanted)
    form = "its convolutions are in Winograd's form, for fp32"
    if "fp32" not in wanted:
        raise SettingsError(f"{model}: precision is {shown(wanted)}, but {form}; tune the plain file")
    if len(wanted) > 1:
        notes.append(f"bf16 and int8: not tried, {form}; tune the plain file for these")
    return ("fp32",)


def _images(
    data: Sequence[str],
    known: tuple[str, ...],
    classes: tuple[str, ...] | None,
    limit: int | None,
    calibrate: bool,
) -> tuple[Dataset, Dataset]:
    """The images to evaluate, in their order, and those to calibrate int8 on: no image is in both."""
    dataset = load_datasets(data, names=known)
    if classes is not None:
        dataset = only_classes(dataset, classes)
    ordered = evaluated_first(dataset)
    if limit is not None:
        ordered = ordered.first(limit)
    apart = min(CALIBRATION_MOST, int(CALIBRATION_SHARE * len(ordered))) if calibrate else 0
    kept = len(ordered) - apart
    if kept < FEWEST_IMAGES:
        raise DataError(f"{dataset.spec}: {kept} images to evaluate; expected at least {FEWEST_IMAGES}")
    evaluated = dataclasses.replace(ordered, images=ordered.images[:kept])
    evaluated.check_objects("measure accuracy on")
    return evaluated, dataclasses.replace(ordered, images=ordered.images[kept:])


def _facts(model: Path, ordered: Dataset, calibration: Dataset, names: object) -> dict[str, Any]:
    """What the figures depend on; with any other of these they are measured anew."""
    return {
        "model": read_onnx(model).check(),
        "data": fingerprint(ordered),
        "calibration": fingerprint(calibration),
        "classes": names,
        "machine": machine(),
        "anchorline": __version__,
        "timing": 2,  # how ``Meter`` takes times
    }


def _parent(workshop: Workshop, threads: int | None) -> Candidate:
    """The file as it is, in its own arithmetic: everything is compared with that."""
    precision = workshop.contract.precision
    if precision not in ("fp32", "int8"):
        raise ArtefactError(f"{workshop.model}: its precision is {precision}; expected fp32 or int8")
    way = Way("cpu", precision, threads or usable_cores())
    proposals, pre_nms = proposal_counts(workshop.proto)
    return Candidate(1.0, proposals, pre_nms, way, workshop.contract.winograd)


def _ways(
    own: str, precisions: Sequence[str], providers: Sequence[str] | None, threads: int | None
) -> list[Way]:
    """The ways to run a file of the precision ``own`` here."""
    here = [*available_providers(), *(["openvino"] if has_openvino() else [])]
    wanted = [each for each in providers or PROVIDERS if each in here]
    if not wanted:
        raise SettingsError(f"provider is {shown(providers)}; available here: {', '.join(here)}")
    most = threads or usable_cores()
    counts = [most] if threads or most == 1 else [most, most // 2]
    found = []
    for provider in wanted:
        kinds = [own] if own in precisions else []
        if own == "fp32" and provider == "openvino" and has_native_bf16() and "bf16" in precisions:
            kinds.append("bf16")
        found += [Way(provider, kind, count) for kind in kinds for count in counts]
    return found


def _search(
    workshop: Workshop,
    meter: Meter,
    parent: Candidate,
    goal: Goal,
    precisions: Sequence[str],
    providers: Sequence[str] | None,
    threads: int | None,
    calibration: Dataset,
    found: dict[Candidate, Figures],
    notes: list[str],
) -> None:
    """Fill ``found``: the ways to run the parent, then its settings by halving, then other precisions of the
    best and Winograd's form."""
    total = len(meter.dataset)
    ways = _ways(parent.way.precision, precisions, providers, threads)
    fastest = _fastest_ways(meter, parent, ways, "the parent", notes)
    if not fastest:
        raise SettingsError(f"no way to run the model is left; {'; '.join(notes)}")
    free = workshop.contract.canvas is None
    if not free:
        notes.append(
            "scale: not tried, the file was made for one canvas ({}x{}); export it for any frame size".format(
                *(workshop.contract.canvas or ())
            )
        )

    def measure(candidate: Candidate, images: int) -> Figures:
        found[candidate] = meter(candidate, images)  # at once, so that Ctrl-C leaves it
        return found[candidate]

    pool = candidates(parent, fastest[0], free)
    for _ in halving(pool, parent, total, goal, measure):
        pass
    complete = {each: figures for each, figures in found.items() if figures.images == total}
    best = choose(complete, parent, goal) or parent
    for way in fastest[1:]:  # of other precisions
        measure(dataclasses.replace(best, way=way), total)
    for each in _in_winograd(workshop, meter, best, ways, notes):
        measure(each, total)
    if "int8" in precisions and parent.way.precision == "fp32":
        for each in _in_int8(workshop, meter, best, providers, threads, calibration, notes):
            measure(each, total)


def _fastest_ways(
    meter: Meter, candidate: Candidate, ways: Sequence[Way], name: str, notes: list[str]
) -> list[Way]:
    """The fastest way of each precision to run the candidate, which the notes call ``name``, the fastest of
    all first; those that do not run here are told of."""
    shares: dict[Way, float] = {}
    for way in ways:
        try:
            shares[way] = meter.share(dataclasses.replace(candidate, way=way))
        except (ArtefactError, GpuError, SettingsError) as error:
            notes.append(f"{name}: {way} does not run here ({error})")
    ranked = sorted(shares, key=shares.__getitem__)
    if ranked:
        times = "; ".join(f"{way} {shares[way]:.2f}" for way in ranked)
        notes.append(f"time of {name} by ways to run it: {times}")
    best: dict[str, Way] = {}
    for way in ranked:
        best.setdefault(way.precision, way)
    return [*best.values()]


def _in_winograd(
    workshop: Workshop, meter: Meter, best: Candidate, ways: Sequence[Way], notes: list[str]
) -> list[Candidate]:
    """The best one with the convolutions that gain by it in Winograd's form, run the fastest way in fp32."""
    ways = [way for way in ways if way.precision == "fp32" and way.provider != "cuda"]
    if not ways or best.winograd:
        return []
    rewritten = dataclasses.replace(best, winograd=True)
    count = contract_in(workshop.make(rewritten)).source["winograd"]
    notes.append(f"Winograd's form (W): {count} convolutions gain by it")
    if not count:
        return []
    fastest = _fastest_ways(meter, rewritten, ways, "Winograd's form", notes)
    return [dataclasses.replace(rewritten, way=way) for way in fastest]


def _in_int8(
    workshop: Workshop,
    meter: Meter,
    best: Candidate,
    providers: Sequence[str] | None,
    threads: int | None,
    calibration: Dataset,
    notes: list[str],
) -> list[Candidate]:
    """The best one's file in 8-bit integers, at its scale and the next larger ones."""
    if not len(calibration):
        return []
    proto = _quantised(workshop, best, calibration, notes)
    if proto is None:
        return []
    workshop.quantised[best.proposals, best.pre_nms] = proto
    ways = _fastest_ways(meter, best, _ways("int8", ("int8",), providers, threads), "int8", notes)
    free = workshop.contract.canvas is None
    larger = [scale for scale in reversed(SCALES) if scale > best.scale][:LARGER_FOR_INT8] if free else []
    scales = best.scale, *larger
    return [dataclasses.replace(best, way=way, scale=scale) for way in ways for scale in scales]


def _quantised(
    workshop: Workshop, best: Candidate, calibration: Dataset, notes: list[str]
) -> onnx.ModelProto | None:
    """The best one's file in integers, with the parent's resize rule; None where it loses too much."""
    floats, integers = workshop.folder / "float.onnx", workshop.folder / "made.int8.onnx"
    save_model(workshop.make(best), floats)
    try:
        result = quantize_dataset(floats, integers, calibration, verify=False)
    except ParityError as error:
        notes.append(f"int8: {error}")
        return None
    notes.append(f"int8: {result.loss.describe()} on the {len(calibration)} images it was calibrated on")
    made = onnx.load(integers)
    contract = dataclasses.replace(contract_in(made), resize=workshop.contract.resize)
    set_contract(made, contract)
    return made


def _publish(workshop: Workshop, row: Row, report: TuneReport, dataset: Dataset, out: Path) -> Figures:
    """Write the chosen candidate to ``out``, if it keeps the goal when it is read again and run."""
    candidate, figures, own = row.candidate, row.figures, report.parent.figures
    way = candidate.way
    made = workshop.make(candidate)
    tuned = {
        "parent": workshop.model.name,
        "scale": candidate.scale,
        "proposals": candidate.proposals,
        "pre_nms": candidate.pre_nms,
        **dataclasses.asdict(way),
        "goal": report.goal.describe(),
        "map50": figures.map50,
        "parent_map50": own.map50,
        "times_as_fast": 1 / figures.share,
        "ms": figures.ms,
        "images": figures.images,
        "data": report.data,
        "machine": report.machine,
        "by": f"anchorline {__version__}",
    }
    contract = contract_in(made)
    source = {**contract.source, "tuned": tuned}
    set_contract(made, dataclasses.replace(contract, source=source))
    with atomic_path(out) as draft:
        save_model(made, draft)
        detector = open_way(draft, way)
        try:
            assert isinstance(detector, Detector)
            found = evaluate(
                detector.batch, dataset, provider=detector.provider, precision=detector.precision
            )
        finally:
            detector.close()
        written = dataclasses.replace(figures, map50=found.map50)
        if not report.goal.holds(written, own):
            raise ParityError(
                f"{out}: read again it has mAP50 {found.map50:.4f}, the search found {figures.map50:.4f} and "
                f"the parent has {own.map50:.4f}; the file was not published; measure anew with --fresh"
            )
        write_tuned(
            draft,
            workshop.model,
            f"tuned for {report.goal.describe()}: mAP50 {found.map50:.4f}, {own.map50:.4f} of "
            f"{workshop.model.name}, on {len(dataset)} images of {report.data}",
        )
    return written
