"""The whole of it on generated scenes, with a clock that knows what each candidate takes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from anchorline import cli
from anchorline.data.dataset import Dataset, LabelledImage, load_dataset
from anchorline.data.synthetic import CLASS_NAMES
from anchorline.doctor.artefact import read_verification
from anchorline.evaluation.evaluation import evaluate
from anchorline.export import winograd
from anchorline.export.functions import save_model
from anchorline.export.graph_settings import contract_in, proposal_counts, set_contract
from anchorline.runtime.contract import WINOGRAD_OP, Contract
from anchorline.runtime.detections import Detections
from anchorline.runtime.detector import Detector
from anchorline.runtime.io.errors import ArtefactError, DataError, ParityError, SettingsError
from anchorline.runtime.model_file import read_onnx
from anchorline.train.checkpoint import contract_of
from anchorline.train.model.faster_rcnn import FasterRCNN
from anchorline.tune import measuring, search
from anchorline.tune import tune as tuning
from anchorline.tune.measuring import Workshop, evaluated_first, fingerprint, only_classes
from anchorline.tune.report import TuneReport
from anchorline.tune.search import SCALES, Candidate, Goal
from anchorline.tune.tune import tune

DATA = "synthetic:24@5"


@pytest.fixture
def model(
    model_without_ties: FasterRCNN,
    onnx_of: Callable[[FasterRCNN, Contract], onnx.ModelProto],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A file for any frame size, 72 proposals of 72; the record goes to a folder of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "model.onnx"
    contract = contract_of(model_without_ties.settings, CLASS_NAMES, source={"data": "none"})
    save_model(onnx_of(model_without_ties, contract), path)
    return path


class Clock:
    """Seconds that pass while a candidate detects: two thirds go with the area, the rest with the proposals.

    ``calls`` counts frames by candidate; after ``most`` of them comes Ctrl-C. The detections are the true
    boxes, less those that the candidate's scale loses, or with ``real`` those of the network.
    """

    def __init__(self, real: bool) -> None:
        self.now, self.real = 100.0, real
        self.calls: dict[Candidate, int] = {}
        self.most: int | None = None
        self._truth: dict[bytes, LabelledImage] = {}

    def __call__(self) -> float:
        return self.now

    def learn(self, dataset: Dataset) -> None:
        self._truth.update((image.load().tobytes(), image) for image in dataset)

    def detect(self, candidate: Candidate, frame: NDArray[np.uint8]) -> Detections:
        image = self._truth[frame.tobytes()]
        kept = np.arange(len(image.boxes)) % 10 >= SCALES.index(candidate.scale)
        scores = np.linspace(0.9, 0.5, int(kept.sum())).astype(np.float32)
        return Detections(image.boxes[kept], scores, image.labels[kept], CLASS_NAMES)


class Ticking:
    def __init__(self, clock: Clock, candidate: Candidate, inner: Any) -> None:
        self._clock, self._candidate, self._inner = clock, candidate, inner

    def __call__(self, frame: NDArray[np.uint8]) -> Detections:
        clock, each = self._clock, self._candidate
        clock.calls[each] = clock.calls.get(each, 0) + 1
        if clock.most is not None and sum(clock.calls.values()) > clock.most:
            raise KeyboardInterrupt
        slower = (1.0 if each.way.threads == 2 else 1.5) * (0.8 if each.winograd else 1.0)
        clock.now += 0.03 * slower * (0.67 * each.scale**2 + 0.33 * (each.proposals + each.pre_nms) / 144)
        return clock.detect(each, frame) if self._inner is None else self._inner(frame)

    def close(self) -> None:
        if self._inner is not None:
            self._inner.close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Clock:
    clock, own = Clock(getattr(request, "param", "") == "real"), Workshop.open
    clock.learn(load_dataset(DATA, names=CLASS_NAMES))
    monkeypatch.setattr(measuring, "perf_counter", clock)
    monkeypatch.setattr(measuring, "REST", 0.0)
    monkeypatch.setattr(tuning, "usable_cores", lambda: 2)

    def opened(shop: Workshop, candidate: Candidate) -> Ticking:
        return Ticking(clock, candidate, own(shop, candidate) if clock.real else None)

    monkeypatch.setattr(Workshop, "open", opened)
    return clock


def run(model: Path, **options: Any) -> TuneReport:
    given = {"precisions": ("fp32",), "providers": ("cpu",), **options}
    return tune(model, [DATA], **given)


@pytest.mark.parametrize("clock", ["real"], indirect=True)
def test_the_best_is_written_and_keeps_what_it_promises(model: Path, clock: Clock, tmp_path: Path) -> None:
    out, figures = tmp_path / "best.onnx", tmp_path / "tuning.json"
    report = run(model, out=out, json_file=figures, pictures=tmp_path / "a.png", goal=Goal(0.01), limit=8)
    assert report.best is not None
    best, own = report.best, report.parent.figures
    assert best.figures.map50 >= own.map50 - 0.01
    assert best.figures.share < 1.0
    assert best.candidate.way.threads == 2
    # What the clock says of it, whatever the machine did meanwhile.
    expected = 0.67 * best.candidate.scale**2 + 0.33 * (
        (best.candidate.proposals + best.candidate.pre_nms) / 144
    )
    assert best.figures.share == pytest.approx(expected)
    assert own.ms == pytest.approx(30.0)
    # The file, read again by itself, has these settings and this accuracy.
    contract = read_onnx(out).contract
    proto = onnx.load(out)
    assert proposal_counts(proto) == (best.candidate.proposals, best.candidate.pre_nms)
    assert contract.resize == measuring.scaled(read_onnx(model).contract.resize, best.candidate.scale)
    assert contract.source["tuned"]["parent"] == "model.onnx"
    assert contract.source["data"] == "none"
    dataset = evaluated_first(load_dataset(DATA, names=CLASS_NAMES)).first(8)
    with Detector(out, "cpu", threads=2) as detector:
        measured = evaluate(detector.batch, dataset, provider="cpu")
    assert measured.map50 == pytest.approx(best.figures.map50, abs=1e-6)
    assert report.written is not None
    assert report.written.map50 == pytest.approx(measured.map50, abs=1e-6)
    verification = read_verification(out)
    assert verification.state == "verified"
    assert "tuned for the fastest that loses at most 1 points" in verification.text
    stated = json.loads(figures.read_text(encoding="utf-8"))
    assert stated["best"]["scale"] == best.candidate.scale
    assert stated["command"] == f"anchorline detect SOURCE --model {out} --provider cpu --threads 2"
    assert len(stated["candidates"]) == len(report.rows)
    assert (tmp_path / "a.png").stat().st_size > 10_000
    rows = [row.figures for row in report.frontier]
    assert rows == sorted(rows, key=lambda each: each.share)
    assert [each.map50 for each in rows] == sorted(each.map50 for each in rows)


@pytest.mark.parametrize("clock", ["real"], indirect=True)
def test_winograd_s_form_is_taken_where_it_is_faster(
    model: Path, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "SCALES", (1.0, 0.7))
    plain = run(model, limit=8)
    assert "Winograd's form (W): 0 convolutions gain by it" in plain.notes
    assert not any(row.candidate.winograd for row in plain.rows)
    monkeypatch.setattr(winograd, "FEWEST_CHANNELS", 1)
    monkeypatch.setattr(winograd, "LEAST_WORK", 1)
    out = tmp_path / "best.onnx"
    report = run(model, limit=8, out=out)
    assert plain.best is not None
    assert report.best is not None
    best = report.best.candidate
    assert best == dataclasses.replace(plain.best.candidate, winograd=True)
    assert report.best.figures.share == pytest.approx(0.8 * plain.best.figures.share)
    contract = read_onnx(out).contract
    assert contract.source["winograd"] == sum(
        node.op_type == WINOGRAD_OP for node in onnx.load(out).graph.node
    )
    assert contract.winograd
    assert read_verification(out).state == "verified"
    # The same settings in the plain form have the same detections.
    with Workshop(model) as shop:
        save_model(shop.make(plain.best.candidate), tmp_path / "plain.onnx")
    assert not read_onnx(tmp_path / "plain.onnx").contract.winograd
    with Detector(out, "cpu") as ours, Detector(tmp_path / "plain.onnx", "cpu") as theirs:
        for image in load_dataset(DATA, names=CLASS_NAMES).images[:4]:
            found, expected = ours(image.load()), theirs(image.load())
            assert len(found) == len(expected) > 0
            np.testing.assert_allclose(found.boxes, expected.boxes, atol=0.01)
            np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
    # Such a file stays so, and in fp32.
    again = run(out, limit=8, precisions=("fp32", "bf16", "int8"))
    assert again.calibration_images == 0
    assert {(row.candidate.winograd, row.candidate.way.precision) for row in again.rows} == {(True, "fp32")}
    assert any(note.startswith("bf16 and int8: not tried, its convolutions are in") for note in again.notes)
    with pytest.raises(SettingsError, match=r"precision is .*int8.*tune the plain file"):
        run(out, precisions=("int8",))


def test_after_ctrl_c_it_goes_on_where_it_was(model: Path, clock: Clock, tmp_path: Path) -> None:
    clock.most = 250
    out = tmp_path / "best.onnx"
    stopped = run(model, out=out, json_file=tmp_path / "a.json")
    assert stopped.interrupted
    assert stopped.best is None
    assert not out.exists()
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["interrupted"]
    before, clock.calls, clock.most = dict(clock.calls), {}, None
    resumed = run(model)
    again = sum(clock.calls.values())
    clock.calls = {}
    whole = run(model, fresh=True)
    assert 0 < again < sum(clock.calls.values()) - 100
    assert len(before) > 3
    assert outline(resumed) == outline(whole)
    # All is known now: another goal measures what it needs besides, and the same one nothing.
    clock.calls = {}
    assert outline(run(model)) == outline(whole)
    assert clock.calls == {}


def outline(report: TuneReport) -> list[tuple[Candidate, int, float, float]]:
    """The best and all rows, times without the last digits of the clock."""
    assert report.best is not None
    return [
        (row.candidate, row.figures.images, row.figures.map50, round(row.figures.share, 6))
        for row in (report.best, *report.rows)
    ]


def test_a_budget_is_kept(model: Path, clock: Clock, tmp_path: Path) -> None:
    report = run(model, goal=Goal(budget_ms=12.0))
    assert report.best is not None
    assert report.best.figures.ms <= 12.0
    complete = [row.figures for row in report.rows if row.figures.images == report.images]
    assert report.best.figures.map50 == max(each.map50 for each in complete if each.ms <= 12.0)
    nothing = run(model, goal=Goal(budget_ms=0.5), out=tmp_path / "none.onnx")
    assert nothing.best is None
    assert not (tmp_path / "none.onnx").exists()
    assert nothing.describe() == "nothing that was tried is the most accurate within 0.5 ms a frame"


def test_a_file_that_does_not_keep_the_goal_is_not_published(
    model: Path, clock: Clock, tmp_path: Path
) -> None:
    # What the search saw are the true boxes, which the file itself does not find.
    out = tmp_path / "best.onnx"
    with pytest.raises(ParityError, match="the file was not published; measure anew with --fresh"):
        run(model, out=out, goal=Goal(0.0), json_file=tmp_path / "tuning.json")
    assert not out.exists()
    assert (tmp_path / "tuning.json").exists()


def test_classes_that_are_kept(model: Path, clock: Clock, tmp_path: Path) -> None:
    report = run(model, classes=("ring", "arrow"))
    with Workshop(model, ("ring", "arrow")) as shop:
        assert contract_in(shop.make(report.parent.candidate)).names == ("ring", "arrow")
    dataset = only_classes(load_dataset(DATA, names=CLASS_NAMES), ("ring", "arrow"))
    assert set(dataset.names) == {"ring", "arrow"}
    assert sum(report.parent.figures.objects) == sum(len(image.boxes) for image in dataset)
    with pytest.raises(SettingsError, match=r"classes are .*'moon'.*expected names of the model"):
        run(model, classes=("moon",))


def test_a_fixed_canvas_is_not_scaled(
    model: Path,
    clock: Clock,
    model_without_ties: FasterRCNN,
    onnx_of: Callable[[FasterRCNN, Contract], onnx.ModelProto],
) -> None:
    contract = contract_of(model_without_ties.settings, CLASS_NAMES, source={})
    # The same graph, whose sides are declared: an export for a canvas would take ten seconds.
    proto = onnx_of(model_without_ties, contract)
    for place, side in ((1, 64), (2, 96)):
        proto.graph.input[0].type.tensor_type.shape.dim[place].dim_value = side
    set_contract(proto, dataclasses.replace(contract, canvas=(64, 96)))
    save_model(proto, model)
    report = run(model)
    assert {row.candidate.scale for row in report.rows} == {1.0}
    assert any(note.startswith("scale: not tried, the file was made for one canvas") for note in report.notes)


def test_the_record_is_of_this_model_and_these_images(model: Path, clock: Clock, tmp_path: Path) -> None:
    run(model)
    (record,) = (tmp_path / "cache" / "anchorline" / "tuning").glob("*.json")
    content = json.loads(record.read_text(encoding="utf-8"))
    clock.calls = {}
    clock.learn(load_dataset("synthetic:24@6", names=CLASS_NAMES))
    tune(model, ["synthetic:24@6"], precisions=("fp32",), providers=("cpu",))
    assert len(clock.calls) > 5
    for damage in (b"{", b"[]", json.dumps({**content, "measured": {"a": {"seconds": [1.0]}}}).encode()):
        record.write_bytes(damage)
        with pytest.raises(ArtefactError, match=r"is damaged \(.*remove the file, or measure anew"):
            run(model)
    assert run(model, fresh=True).best is not None


def test_images_are_taken_in_one_order_and_told_apart() -> None:
    dataset = load_dataset("synthetic:20@1", names=CLASS_NAMES)
    ids = [image.id for image in evaluated_first(dataset)]
    assert ids == [image.id for image in evaluated_first(dataset)]
    assert sorted(ids) == sorted(image.id for image in dataset)
    assert ids != [image.id for image in dataset]
    assert fingerprint(dataset) == fingerprint(load_dataset("synthetic:20@1", names=CLASS_NAMES))
    moved = dataclasses.replace(dataset.images[0], boxes=dataset.images[0].boxes + 1)
    assert fingerprint(dataset) != fingerprint(
        dataclasses.replace(dataset, images=(moved, *dataset.images[1:]))
    )


def test_int8_is_calibrated_on_images_that_are_not_evaluated(
    model: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[str]] = []

    def quantised(floats: Path, integers: Path, dataset: Any, **options: Any) -> None:
        seen.append({image.id for image in dataset})
        raise ParityError("it loses too much")

    monkeypatch.setattr(tuning, "quantize_dataset", quantised)
    report = run(model, precisions=("fp32", "int8"))
    assert (report.images, report.calibration_images) == (18, 6)
    assert "int8: it loses too much" in report.notes
    evaluated = evaluated_first(load_dataset(DATA, names=CLASS_NAMES)).images[:18]
    assert len(seen[0]) == 6
    assert not seen[0] & {image.id for image in evaluated}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out": "best.engine"}, "output is 'best.engine'; expected a file name that ends in .onnx"),
        ({"precisions": ("fp64",)}, "precision is 'fp64'; expected some of fp32, bf16, int8"),
        ({"providers": ("gpu",)}, "provider is 'gpu'; expected some of cpu, openvino, cuda"),
        ({"threads": 0}, "threads is 0; expected a whole number of at least 1"),
        ({"limit": 3}, "limit is 3; expected a whole number of at least 8"),
        ({"goal": Goal(1.5)}, "max drop is 150; expected points of mAP50 from 0 to 100"),
        ({"goal": Goal(float("nan"))}, "max drop is nan"),
    ],
)
def test_what_cannot_be_asked_for(model: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message.replace("(", r"\(")):
        run(model, **options)


def test_what_cannot_be_tuned(model: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="is the model itself"):
        run(model, out=model)
    with pytest.raises(SettingsError, match=r"expected an ONNX file, as anchorline export writes it"):
        run(tmp_path / "model.safetensors")
    with pytest.raises(ArtefactError, match="no such file"):
        run(tmp_path / "missing.onnx")
    with pytest.raises(DataError, match="4 images to evaluate; expected at least 8"):
        tune(model, ["synthetic:4"], precisions=("fp32",))


def test_the_verb(model: Path, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--data", DATA, "--precision", "fp32", "--provider", "cpu"]
    assert cli.main(["tune", str(model), *options, "--max-drop", "1"]) == 0
    told = capsys.readouterr().out
    assert "times as fast as the parent" in told
    assert "run it: anchorline detect SOURCE --model" in told
    assert cli.main(["tune", str(model), *options, "--max-drop", "1", "--budget", "5ms"]) == 2
    assert "both --budget and --max-drop are given" in capsys.readouterr().err
    assert cli.main(["tune", str(model), *options, "--budget", "soon"]) == 2
    assert cli.main(["tune", str(model), *options, "--budget", "0.5"]) == 1
    capsys.readouterr()
    clock.calls, clock.most = {}, 60
    assert cli.main(["tune", str(model), *options, "--fresh"]) == 130
    assert "interrupted" in "".join(capsys.readouterr())
