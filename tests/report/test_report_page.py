"""The page of ``anchorline report``: what it says, what it refuses, that no text of a file becomes markup."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from anchorline import cli
from anchorline.data.dataset import LabelledImage
from anchorline.evaluation.evaluation import proposal_recall
from anchorline.report.markup import Html, picture, tag, text, thinned
from anchorline.report.page import render, report
from anchorline.report.sources import gather
from anchorline.runtime.contract import CONTRACT_KEY, Contract
from anchorline.runtime.detections import Detections
from anchorline.runtime.io.files import sha256_of
from anchorline.verify.verification import write_not_executed

VOID = {"img", "meta"}
ELEMENTS = {
    *(
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "header",
        "nav",
        "main",
        "section",
        "article",
        "footer",
    ),
    *("h1", "h2", "h3", "h4", "p", "a", "ul", "ol", "li", "dl", "dt", "dd", "div", "span", "strong", "small"),
    *("code", "pre", "details", "summary", "table", "caption", "thead", "tbody", "tr", "th", "td"),
    *("figure", "figcaption", "img", "svg", "path", "rect", "text"),
}


class Page(HTMLParser):
    """Elements in order with their attributes, and the text; every element has to be closed in its turn."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.style = ""
        self.feed(content)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["style"]:
            self.style += data
        elif data.strip():
            self.words.append(data)

    @property
    def shown(self) -> str:
        return "\n".join(self.words)


def checked(content: str) -> Page:
    """The page, which reaches for nothing outside itself and holds no foreign element."""
    page = Page(content)
    assert {name for name, _ in page.elements} <= ELEMENTS
    for name, attributes in page.elements:
        assert not [key for key in attributes if key.startswith("on") or key in ("style", "srcset", "action")]
        assert str(attributes.get("src", "data:image/jpeg;base64,")).startswith("data:image/jpeg;base64,"), (
            name
        )
        assert str(attributes.get("href", "#")).startswith("#")
    assert not re.search(r"url\(|@import|https?:", page.style)
    (policy,) = [each["content"] for name, each in page.elements if each.get("http-equiv")]
    digest = base64.b64encode(hashlib.sha256(page.style.encode()).digest()).decode()
    assert policy is not None
    assert policy.startswith(f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:;")
    ids = [each["id"] for _, each in page.elements if "id" in each]
    assert len(set(ids)) == len(ids)
    links = {str(each["href"])[1:] for _, each in page.elements if "href" in each}
    assert links <= set(ids)
    return page


def written(folder: Path, *options: str) -> Page:
    out = folder / "page.html"
    assert cli.main(["report", str(folder), "--out", str(out), *options]) == 0
    return checked(out.read_text(encoding="utf-8"))


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_all_that_the_verbs_found_is_on_the_page(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = written(run)
    captured = capsys.readouterr()
    assert re.fullmatch(r".*page\.html: \d+ kB\n", captured.out)
    assert captured.err == ""  # nothing is missing, nothing left out
    shown = page.shown
    for name in read(run / "evaluation.json")["per_class"]:
        assert name in page.words  # as text, the hostile ones too
    for stage, times in read(run / "bench.json")[0]["stages"].items():
        assert stage in page.words
        assert f"{times['p99']:,.2f}" in page.words
    assert "The numbers held." in page.words
    assert sha256_of(run / "model.onnx") in page.words
    assert "</style><b>bold" in page.words
    assert all(f"trap: {trap['name']}" in page.words for trap in read(run / "verify.json")["traps"])
    for part in ("Precision and recall", "Confusion", "The worst images", "What is not here"):
        assert (part in shown) == (part != "What is not here")
    (image,) = [each for name, each in page.elements if name == "img"]
    assert "2: 1 missed, 1 false; 3: 1 missed, 1 false; 1: 0 missed" in str(image["alt"])
    content = base64.b64decode(str(image["src"]).partition(",")[2])
    sheet = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    assert sheet.shape[1] == int(str(image["width"]))
    curves = [each for name, each in page.elements if name == "path" and "line l0" in str(each.get("class"))]
    assert len(curves) == 1  # only class 0 is ever found


def test_one_evaluation_and_one_verification_are_shown_once(run: Path) -> None:
    found = gather(run)
    assert [bool(each.curves and each.confusion and each.worst) for each in found.evaluations] == [True]
    (only,) = found.verifications
    assert only.date  # that of the record
    assert len(found.bench) == 1


def test_by_default_it_lies_beside_the_model(run: Path) -> None:
    assert report(run / "model.onnx").path == run / "report.html"
    assert (run / "report.html").is_file()


def test_it_never_takes_the_place_of_the_model(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = run / "model.onnx"
    before = model.read_bytes()
    assert cli.main(["report", str(model), "--out", str(model)]) == 2
    assert "expected one that ends in .html" in capsys.readouterr().err
    assert model.read_bytes() == before


def test_what_is_missing_is_named_with_its_command(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (run / "model.onnx").rename(bare / "model.onnx")
    page = written(bare)
    told = capsys.readouterr().err.splitlines()
    for part, verb in (("accuracy", "evaluate"), ("parity", "verify"), ("latency", "bench")):
        assert any(line.startswith(f"missing: {part}; anchorline {verb} ") for line in told)
        assert any(word.startswith(f"{part}: not measured") for word in page.words)
    assert len(told) == 3


def test_figures_of_an_older_file_are_never_shown(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = onnx.load(run / "model.onnx")
    model.producer_name = "somebody else"
    onnx.save(model, run / "model.onnx")
    page = written(run)
    told = capsys.readouterr().err
    for name in ("evaluation.json", "bench.json", "verify.json", "model.onnx.verify.json"):
        assert f"not shown: {name}: is stale: it is of another model.onnx (SHA-256 " in told
    assert not {"The numbers held.", "mAP50", "frames a second"} & set(page.words)
    for option, name in (
        ("--evaluation", "evaluation"),
        ("--verify", "verify.json"),
        ("--bench", "bench.json"),
    ):
        code = cli.main(["report", str(run), option, str(run / name), "--out", str(run / "refused.html")])
        assert (code, (run / "refused.html").exists()) == (2, False)
        (line,) = capsys.readouterr().err.splitlines()
        assert "is stale" in line
        assert "measure" in line


def test_files_elsewhere_are_named(run: Path, tmp_path: Path) -> None:
    elsewhere, alone = tmp_path / "elsewhere", tmp_path / "alone"
    alone.mkdir()
    run.rename(elsewhere)
    (elsewhere / "model.onnx").rename(alone / "model.onnx")
    named = {"--evaluation": "evaluation", "--verify": "verify.json", "--bench": "bench.json"}
    page = written(
        alone, *(word for option, name in named.items() for word in (option, f"{elsewhere / name}"))
    )
    assert {"The numbers held.", "mAP50", "frames a second", "The worst images"} <= set(page.words)
    found = gather(alone / "model.onnx", [elsewhere / "evaluation.json"])
    assert found.evaluations[0].curves is None  # which lie in another folder
    assert [what for what, _ in found.missing()] == [
        "curves, confusion and worst images",
        "parity",
        "latency",
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ('{"map50": "high", "per_class": {}, "images": 1}', "is damaged, or of another version"),
        ('{"map50": 1e999, "per_class": {}, "images": 1e99}', "is damaged, or of another version"),
        ('{"licenses": []}', "is not what anchorline evaluate writes"),
        ("null", "is not what anchorline evaluate writes"),
    ],
    ids=["cut off", "deep", "text", "huge", "foreign", "null"],
)  # fmt: skip
def test_a_damaged_or_foreign_file(
    content: str, said: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "broken.json"
    path.write_text(content, encoding="utf-8")
    out = run / "page.html"
    assert cli.main(["report", str(run), "--evaluation", str(path), "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"anchorline: {path}: {said}")
    assert not out.exists()
    written(run)  # found, it does no harm: told of where it is broken, passed over where it is another's
    told = capsys.readouterr().err
    assert ("not shown: broken.json" in told) == (not said.startswith("is not what"))


def test_pictures_that_are_gone_broken_or_of_another_evaluation(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "evaluation/worst_images.jpg").write_bytes(b"\xff\xd8 no picture")
    confusion = read(run / "evaluation/confusion.json")
    (run / "evaluation/confusion.json").write_text(json.dumps({**confusion, "data": "other"}))
    (run / "evaluation/pr_curves.json").unlink()
    page = written(run)
    assert "The picture cannot be read" in page.shown
    assert "Confusion" not in page.words
    told = capsys.readouterr().err
    assert "confusion.json: is of another evaluation than per_class.json" in told
    assert "missing: curves" in told
    (run / "evaluation/worst_images.jpg").unlink()
    assert "The worst images" not in written(run).words


def test_the_reference_that_it_agrees_with_was_evaluated(run: Path) -> None:
    record = read(run / "model.onnx.verify.json")
    reference = record["reference"]
    for path in (run / "evaluation.json", *(run / "evaluation").glob("*.json")):
        path.write_text(json.dumps({**read(path), "model": reference}), encoding="utf-8")
    found = gather(run)
    assert [each.of for each in found.evaluations] == ["reference.onnx"]
    assert found.evaluations[0].curves is not None
    assert "Measured with reference.onnx" in checked(render(found)).shown
    for path in (run / "model.onnx.verify.json", run / "verify.json"):
        path.write_text(json.dumps({**record, "passed": False}), encoding="utf-8")
    differing = gather(run)  # whose figures are another network's
    assert differing.evaluations == []
    assert "is of reference.onnx" in "".join(differing.left_out)


def test_the_training_with_the_model_s_settings(
    run: Path, one_box_model: Callable[[Contract], onnx.ModelProto], capsys: pytest.CaptureFixture[str]
) -> None:
    steps = range(1, 2001)  # more than are drawn
    rows = "".join(f"{step},{1 / step},\n" for step in steps)
    (run / "train").mkdir()
    (run / "train/metrics.csv").write_text(f"step,loss,map50\n{rows}2000,,0.5\n")
    (run / "train/settings.json").write_text('{"training": {"seed": 1}}')
    assert "Loss over the steps of the training" not in written(run).shown
    assert "metrics.csv: is of a training with other settings" in capsys.readouterr().err
    (run / "train/settings.json").write_text("{}")
    assert cli.main(["report", str(run), "--training", str(run / "train")]) == 2
    model = onnx.load(run / "model.onnx")
    (entry,) = [each for each in model.metadata_props if each.key == CONTRACT_KEY]
    contract = json.loads(entry.value)
    contract["source"]["settings"] = {"training": {"seed": 1}}
    entry.value = json.dumps(contract)
    onnx.save(model, run / "model.onnx")
    (run / "train/settings.json").write_text('{"training": {"seed": 1}}')
    page = written(run)
    assert "Loss over the steps of the training" in page.shown
    drawn = [
        str(each["d"]) for name, each in page.elements if name == "path" and "line" in str(each["class"])
    ]
    ends = [path.rpartition("L")[2].split()[0] for path in drawn if path.count("L") > 100]
    assert ends == ["508.0"]  # the right edge: the last step is there


def test_a_verdict_that_differs_and_none_at_all(
    run: Path, measured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = onnx.load(run / "model.onnx")
    (score,) = [each for each in model.graph.initializer if each.name == "score"]
    score.CopyFrom(numpy_helper.from_array(np.array([[0.5]], np.float32), "score"))
    onnx.save(model, run / "model.onnx")
    spec = f"coco:{run / 'images'},{run / 'images/annotations.json'}"
    assert (
        cli.main(["verify", str(measured / "reference.onnx"), str(run / "model.onnx"), "--data", spec]) == 1
    )
    page = written(run)
    assert "They differ, first in detections." in page.words
    assert {"differs", "On labelled images", "with reference.onnx"} <= set(page.words)
    kinds = [each["class"] for name, each in page.elements if str(each.get("class")).startswith("verdict")]
    assert kinds == ["verdict bad"]
    write_not_executed(run / "model.onnx", "no GPU </main>", measured / "reference.onnx")
    page = written(run)
    assert "Not verified: no GPU </main>" in page.words
    assert "They differ" not in page.shown


def test_proposals_and_an_engine_s_build(
    run: Path, tmp_path: Path, one_box_model: Callable[[Contract], onnx.ModelProto]
) -> None:
    folder = tmp_path / "engine"
    folder.mkdir()
    path = folder / "model.engine"
    path.write_bytes(b"plan")
    contract = Contract("detections", ("thing",), (32, 64), (0.0,) * 3, (1.0,) * 3)
    manifest = {
        "contract": json.loads(contract.to_json()),
        "flavour": "tensorrt",
        "flavour_version": "10.16.1.11",
        "compute_capabilities": [86],
        "precision": "fp16",
        "profiles": [{"batch": [1, 1, 4]}],
        "engine": {"sha256": sha256_of(path)},
        "options_hash": "abc",
        "gpu": "<b>A GPU</b>",
        "build_seconds": 12.5,
        "warnings": ["</code><script>"],
    }
    path.with_name("model.engine.json").write_text(json.dumps(manifest), encoding="utf-8")
    found = Detections([[0, 0, 8, 8]], [0.9], [0])
    image = LabelledImage(
        "one",
        (32, 64),
        found.boxes,
        found.labels,
        *np.zeros((2, 1), np.bool_),
        load=lambda: np.zeros((1, 1, 3)),
    )
    recall = proposal_recall([image], [found], provider="tensorrt").to_json()
    recall["model"] = {"name": path.name, "sha256": sha256_of(path)}
    (folder / "recall.json").write_text(json.dumps(recall), encoding="utf-8")
    page = written(folder)
    assert {"<b>A GPU</b>", "12.5", "engine of TensorRT 10.16.1.11", '["</code><script>"]'} <= set(page.words)
    assert {"1000 proposals", "IoU 0.95", "average recall"} <= set(page.words)
    assert "sm_86" in page.shown


def test_a_folder_with_several_models_or_none(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "other.onnx").write_bytes((run / "model.onnx").read_bytes())
    assert cli.main(["report", str(run)]) == 2
    assert "holds 2 models (model.onnx, other.onnx, ...); name one of them" in capsys.readouterr().err
    assert cli.main(["report", str(run / "images")]) == 2
    assert "holds no .engine, .onnx or .safetensors" in capsys.readouterr().err
    assert cli.main(["report", str(run / "gone.onnx")]) == 2
    assert "no such file" in capsys.readouterr().err


def poisoned(value: Any) -> Iterator[Any]:
    """Copies of a JSON, in each of which one text or name has become markup."""
    evil = '"><img src=x onerror=alert(1)></td></table>\u202e\x1b[31m'
    if isinstance(value, str):
        yield evil
    elif isinstance(value, list):
        for place, each in enumerate(value[:2]):
            yield from ([*value[:place], changed, *value[place + 1 :]] for changed in poisoned(each))
    elif isinstance(value, dict):
        for key, each in value.items():
            if key == "sha256":
                continue
            yield from ({**value, key: changed} for changed in poisoned(each))
        if value:
            key = next(iter(value))
            yield {**{name: each for name, each in value.items() if name != key}, evil: value[key]}


@pytest.mark.parametrize("name", ["evaluation.json", "bench.json", "model.onnx.verify.json"])
def test_no_text_of_a_file_becomes_markup(name: str, run: Path) -> None:
    for path in (run / "verify.json", run / "evaluation.json", run / "bench.json"):
        if path.name != name:
            path.unlink()
    (run / "evaluation/worst_images.jpg").unlink()
    shown = 0
    for changed in poisoned(read(run / name)):
        (run / name).write_text(json.dumps(changed), encoding="utf-8")
        page = checked(render(gather(run)))
        shown += "onerror=alert(1)" in page.shown
        assert "\x1b" not in page.shown
        assert "\u202e" not in page.shown
    assert shown >= 3  # the texts do reach the page


def test_very_many_classes_give_a_page_of_bounded_size(
    run: Path, one_box_model: Callable[[Contract], onnx.ModelProto]
) -> None:
    names = [f"class {number} " + 180 * "x" for number in range(3000)]
    contract = Contract("detections", tuple(names), (32, 64), (0.0,) * 3, (1.0,) * 3)
    onnx.save(one_box_model(contract), run / "model.onnx")
    model = {"name": "model.onnx", "sha256": sha256_of(run / "model.onnx")}
    each = {"ap50": 0.5, "voc07": 0.5, "ap": 0.5, "objects": 10}
    evaluation = {**read(run / "evaluation.json"), "model": model, "per_class": dict.fromkeys(names, each)}
    curve = {"objects": 10, "ap50": 0.5, "recall": [0.5, 1.0] * 5000, "precision": [0.5, float("nan")] * 5000}
    curves = {"iou_threshold": 0.5, "classes": dict.fromkeys(names[:50], curve), "model": model}
    counts = np.eye(301, dtype=int).tolist()
    confusion = {
        "names": names[:301],
        "counts": counts,
        "min_score": 0.5,
        "iou_threshold": 0.5,
        "model": model,
    }
    for name, value in (("per_class", evaluation), ("pr_curves", curves), ("confusion", confusion)):
        value["data"] = evaluation["data"]
        (run / f"evaluation/{name}.json").write_text(json.dumps(value), encoding="utf-8")
    content = render(gather(run))
    page = checked(content)
    assert "of 3000" in page.shown
    assert len(content) < 1_500_000


def test_a_picture_of_noise_is_made_small_enough() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (3000, 2000, 3), np.uint8)
    made = picture(noise, 'an "alt"')
    assert 100_000 < len(made) < 2_100_000
    assert 'alt="an &quot;alt&quot;"' in made


def test_markup_escapes_all_but_markup() -> None:
    assert tag("p", "<b>", Html("<i>"), title='"', class_="x", id=None) == (
        '<p title="&quot;" class="x">&lt;b&gt;<i></p>'
    )
    assert text("\u202ex") == "\\u202ex"
    assert len(text("y" * 5000)) < 1100
    assert thinned([0, 1, 2], [0.0, float("nan"), float("inf")]) == [(0, 0.0)]
    many = thinned(range(10_000), range(10_000))
    assert (many[0], many[-1]) == ((0, 0), (9999, 9999))
    assert len(many) < 500


_place = Path(__file__).resolve().parent.parent / "serving" / "chromium.py"
_spec = importlib.util.spec_from_file_location("report_chromium", _place)
assert _spec is not None
assert _spec.loader is not None
chromium = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(chromium)


@pytest.mark.skipif(chromium.find_chromium() is None, reason="needs Chromium or Chrome")
def test_a_browser_shows_it_wide_and_narrow_and_its_policy_forbids_nothing_of_it(run: Path) -> None:
    path = report(run).path
    with chromium.Chromium() as browser:
        browser.call("Page.navigate", url=path.as_uri())
        browser.wait_for("document.readyState == 'complete' && !!document.querySelector('footer')")
        for width in (1200, 360):
            browser.size(width, 800)
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
        assert browser.evaluate("document.querySelector('img').naturalWidth") > 100
        assert browser.evaluate("getComputedStyle(document.querySelector('.cards')).display") == "grid"
        assert browser.evaluate("document.querySelectorAll('script, b, i').length") == 0
        assert browser.complaints == []
