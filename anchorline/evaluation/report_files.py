"""Everything an evaluation can show, written into one folder."""

from __future__ import annotations

from pathlib import Path

from anchorline.evaluation.confusion import confusion_matrix
from anchorline.evaluation.dataset import Dataset
from anchorline.evaluation.evaluate import EvaluationReport
from anchorline.evaluation.plots import plot_pr_curves
from anchorline.evaluation.proposal_recall import ProposalReport
from anchorline.evaluation.report_plots import plot_class_table, plot_confusion, plot_recall
from anchorline.evaluation.worst_images import worst_images_sheet
from anchorline.runtime.errors import SettingsError
from anchorline.runtime.files import write_json


def write_report_files(
    report: EvaluationReport | ProposalReport,
    dataset: Dataset,
    folder: str | Path,
    shown_score: float = 0.5,
    worst_images: int = 12,
) -> None:
    """Write each of an evaluation's results as a picture and, with the same name, as JSON.

    For detections ``per_class``, ``pr_curves``, ``confusion`` and ``worst_images`` (a .jpg); the last
    two count detections from ``shown_score`` on. For proposals ``recall``. ``dataset`` is the one
    that was evaluated.
    """
    folder = Path(folder)
    if isinstance(report, ProposalReport):
        plot_recall(report, folder / "recall.png")
        write_json(folder / "recall.json", report.to_json())
        return
    if not 0.0 <= shown_score <= 1.0:
        raise SettingsError(f"shown score is {shown_score}; expected 0 to 1")
    if len(report.detections) != len(dataset):
        raise SettingsError(
            f"the report holds detections of {len(report.detections)} images and {dataset.spec} has "
            f"{len(dataset)}; give the data set that was evaluated"
        )
    plot_class_table(report, folder / "per_class.png")
    write_json(folder / "per_class.json", report.to_json())
    plot_pr_curves(report, folder / "pr_curves.png")
    curves = {name: curve.to_json() for name, curve in report.curves.items()}
    write_json(folder / "pr_curves.json", {"iou_threshold": 0.5, "classes": curves})
    confusion = confusion_matrix(dataset, report.detections, shown_score)
    plot_confusion(confusion, folder / "confusion.png")
    write_json(folder / "confusion.json", confusion.to_json())
    sheet = folder / "worst_images.jpg"
    worst = worst_images_sheet(dataset, report.detections, sheet, worst_images, shown_score)
    write_json(
        folder / "worst_images.json",
        {"min_score": shown_score, "images": [each.to_json() for each in worst]},
    )
