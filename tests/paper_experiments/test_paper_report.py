"""The tables of benchmarks/reports/paper.md, from rows that are worked by hand."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from paper_experiments.published import TABLES, TIMES
from paper_experiments.report import BEGIN, END, fill, report
from paper_experiments.state import publish

from anchorline.runtime.io.errors import DataError

COMMON = {"data": "tiny trainval, test", "images": "8 + 4", "preset": "tiny", "canvas": "64x96"}
DOCUMENT = Path(__file__).resolve().parents[2] / "benchmarks" / "reports" / "paper.md"


def row(experiment: str, seed: int, voc07: float | str, **more: Any) -> dict[str, Any]:
    figures = {"variant": "", "proposals": 300, "epochs": 8, "voc07": voc07, "map50": voc07}
    return {"experiment": experiment, "seed": seed, **figures, **more}


@pytest.fixture
def rows(results: Path) -> list[dict[str, Any]]:
    found = [row("joint", 0, 0.80, recall50=0.95, recall70=0.7), row("joint", 1, 0.84)]
    for seed, (shared, unshared) in enumerate([(0.80, 0.79), (0.82, 0.83)]):
        found.append(row("alternating", seed, shared, variant="shared"))
        found.append(row("alternating", seed, unshared, variant="unshared", epochs=3))
    found.append(row("selective-search", 0, "", epochs="", proposals="", note="not run: no contrib build"))
    found.append(row("proposals", 0, 0.5, variant="no cls", proposals=100, recall50=0.9, recall70=0.25))
    found.append(row("proposals", 0, 0.62, variant="RPN", proposals=100, recall50=0.97, recall70=0.8))
    found.append(row("lambda", 0, 0.83, variant="100"))
    found.append(row("recall", 0, "", variant="RPN, shared", proposals=50, recall50=0.9, recall70=0.5))
    found.append(row("recall", 1, "", variant="RPN, shared", proposals=50, recall50=0.8, recall70=0.4))
    times = {"conv_ms": 20.0, "rpn_ms": 2.0, "selection_ms": 6.0, "region_ms": 12.0}
    found.append(row("timing", 0, "", **times))
    publish("abcd", {**COMMON, "device": "cpu", "threads": 2}, "command", found)
    return found


def lines_of(text: str, start: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(start)]


def test_ours_beside_the_paper_s(rows: list[dict[str, Any]]) -> None:
    text = report()
    assert "Data: tiny trainval, test (8 + 4 images). Model: `tiny`, canvas 64x96; 8 epochs" in text
    assert "seeds 0, 1" in text
    assert lines_of(text, "| alternating, shared") == [
        "| alternating, shared (4 steps) | 8 | 2 | 81.0 (80.0 to 82.0) | 81.0 (80.0 to 82.0) "
        "| ZF 59.9, VGG 69.9 |"
    ]
    assert lines_of(text, "| no cls, 100 ") == [
        "| no cls, 100 proposals | 8 | 1 | 50.0 | 50.0 | 90.0, 25.0 | 44.6 |"
    ]
    assert lines_of(text, "| 3 scales, 1 ratio") == ["| 3 scales, 1 ratio | - | - | - | - | - | 69.8 |"]
    assert lines_of(text, "| selective search, 2000") == [
        "| selective search, 2000 | - | - | - | - | ZF 58.7, VGG 66.9 |"
    ]
    assert "Note: not run: no contrib build." in text


def test_each_trend_is_counted_seed_by_seed(rows: list[dict[str, Any]]) -> None:
    text = report()
    (sharing,) = lines_of(text, "- alternating, shared (4 steps) minus")
    assert sharing.endswith("+1.0, -1.0; the paper +1.2, +1.4: the same direction in 1 of 2 seeds.")
    (ranking,) = lines_of(text, "- no cls, 100 proposals minus")
    assert ranking.endswith("-12.0; the paper -10.5: the same direction in 1 of 1 seeds.")
    (weight,) = lines_of(text, "- 10 minus 100")
    assert weight.endswith("-3.0; the paper +0.8: close, below 2.0 points, in 0 of 1 seeds.")
    (search,) = lines_of(text, "- RPN shared, 300 minus selective search")
    assert search.endswith("not measured; the paper +1.2, +3.0.")


def test_recall_and_times(rows: list[dict[str, Any]]) -> None:
    text = report()
    assert "| RPN, shared | 85.0, 45.0 |" in text
    (ours,) = lines_of(text, "| ours, PyTorch")
    assert ours.endswith("2 threads | 20.0 | 2.0 + 6.0 | 12.0 | 40.0 |")
    assert "| VGG-16, K40 (paper) | 141 | 10 | 47 | 198 |" in text


def test_every_trend_names_lines_of_its_table() -> None:
    for table in TABLES:
        labels = [line.label for line in table.lines]
        assert len(set(labels)) == len(labels)
        for trend in table.trends:
            assert {trend.first, trend.second} <= set(labels)
    for _, *parts, whole in TIMES:
        assert sum(map(int, parts)) == int(whole)


def test_the_document_is_filled_between_its_marks(
    program: ModuleType, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    document = tmp_path / "paper.md"
    document.write_text(f"before\n\n{BEGIN}\nnot run yet\n{END}\n\nafter\n")
    assert program.main(["--report", str(document)]) == 0
    once = document.read_text()
    assert once.startswith(f"before\n\n{BEGIN}\n\nData: ")
    assert once.endswith(f"\n{END}\n\nafter\n")
    assert "not run yet" not in once
    assert program.main(["--report", str(document)]) == 0
    assert document.read_text() == once
    pictures = report(pictures="images")
    assert pictures.startswith(once[once.index("Data: ") : once.index(f"\n\n{END}")].rstrip())
    assert pictures.endswith("![mAP against test proposals](images/paper-proposals.png)\n")
    document.write_text("no marks")
    with pytest.raises(DataError, match="lacks the lines"):
        fill(document, "text")


def test_the_project_s_document_has_the_marks() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert 0 < text.index(BEGIN) < text.index(END)


def test_the_last_study_or_the_one_asked_for(
    program: ModuleType, rows: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    publish("efgh", COMMON, "command", [row("joint", 0, 0.9)])
    assert "study efgh" in report()
    assert "study abcd" in report("abcd")
    assert program.main(["--report", "--study", "zzz"]) == 2
    assert capsys.readouterr().err.endswith("expected one of abcd, efgh\n")


def test_without_rows_or_summary_it_says_so(
    program: ModuleType, results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program.main(["--report"]) == 2
    assert "run benchmarks/paper.py first" in capsys.readouterr().err
    publish("efgh", COMMON, "command", [row("joint", 0, 0.9)])
    assert program.main(["--report", "--plots", str(tmp_path)]) == 2
    assert "paper.json: cannot be read" in capsys.readouterr().err
