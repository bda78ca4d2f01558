"""How long verifying an ONNX file against its checkpoint takes, in how much memory, and how near the limits.

    python benchmarks/verify.py RUN/model.safetensors RUN/model.onnx --data voc:DIR@test --limit 50
    python benchmarks/verify.py --torchvision fasterrcnn_resnet50_fpn --data synthetic:50

With ``--torchvision`` a model of that name is made with drawn weights, imported and exported first.
``--seeds N`` repeats on N sets of generated scenes instead: none may raise an alarm. One row goes to
``results/verify.csv``.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from record import append_row

from anchorline.verify import verify
from anchorline.verify.verification import VerifyReport


def main() -> None:
    """Verify, print, append the row; exit code 1 when the two differ."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="*", metavar="FILE", help="a checkpoint and its ONNX file")
    parser.add_argument("--torchvision", metavar="NAME", help="make a model of torchvision's instead")
    parser.add_argument("--data", default="synthetic:50")
    parser.add_argument("--limit", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=0, help="repeat on this many sets of generated scenes")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = arguments.files or _made_apart(arguments.torchvision, Path(folder))
        specs = [f"synthetic:{arguments.limit}@{seed}" for seed in range(arguments.seeds)] or [arguments.data]
        reports, start = [], time.perf_counter()
        for spec in specs:
            source = (
                {"images": _pictures(spec, Path(folder))}
                if spec.startswith("synthetic:")
                else {"data": [spec]}
            )
            reports.append(verify(*files, limit=arguments.limit, **source))
            print(f"{spec}: {reports[-1].describe()}", file=sys.stderr)
        seconds = time.perf_counter() - start
    append_row("verify", f"python benchmarks/verify.py {_shown(arguments)}", _figures(reports, seconds))
    sys.exit(0 if all(report.passed for report in reports) else 1)


def _shown(arguments: argparse.Namespace) -> str:
    """The command without this machine's folders."""
    model = (
        f"--torchvision {arguments.torchvision}"
        if arguments.torchvision
        else " ".join(f.name for f in arguments.files)
    )
    data = arguments.data.replace(str(Path(arguments.data.partition(":")[2]).parent) + "/", "")
    if arguments.seeds:
        return f"{model} --seeds {arguments.seeds} --limit {arguments.limit}"
    return f"{model} --data {data} --limit {arguments.limit}"


def _made_apart(name: str, folder: Path) -> list[Path]:
    """``_made`` in a process of its own, whose memory does not count here."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_made, name, folder).result()


def _made(name: str, folder: Path) -> list[Path]:
    """torchvision's model ``name`` with drawn weights that detect things, imported, and its ONNX file."""
    import torch
    import torchvision
    from drawn_weights import draw_weights

    from anchorline.data.synthetic import CLASS_NAMES, generate_scene
    from anchorline.export import export_onnx, import_checkpoint

    builder = getattr(torchvision.models.detection, name)
    model = builder(weights=None, weights_backbone=None, num_classes=len(CLASS_NAMES) + 1)
    scenes = [generate_scene(3, (480, 640), index)[0] for index in range(3)]
    torch.save(draw_weights(model, scenes, seed=0).state_dict(), folder / "model.pth")
    del model
    classes = folder / "classes.txt"
    classes.write_text("\n".join(CLASS_NAMES), encoding="utf-8")
    checkpoint, onnx = folder / "model.safetensors", folder / "model.onnx"
    import_checkpoint(
        folder / "model.pth", checkpoint, arch=name, classes=classes, canvas=(800, 1088), verify=False
    )
    start = time.perf_counter()
    export_onnx(checkpoint, onnx)
    print(f"exported and verified with the quick set in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    return [checkpoint, onnx]


def _pictures(spec: str, folder: Path) -> list[str]:
    """Generated scenes as files, since a model of other classes can look at them without their labels."""
    import cv2

    from anchorline.data.dataset import load_dataset

    target = folder / spec.replace(":", "-")
    target.mkdir(exist_ok=True)
    for image in load_dataset(spec):
        cv2.imwrite(str(target / f"{image.id}.png"), image.load())
    return [str(target)]


def _figures(reports: list[VerifyReport], seconds: float) -> dict[str, object]:
    stages = [stage for report in reports for stage in report.stages or ()]
    worst = max(stages, key=lambda stage: stage.tolerance_used)
    totals = [report.detections.summary.total for report in reports]
    return {
        "passed": sum(report.passed for report in reports),
        "of": len(reports),
        "images": sum(report.detections.summary.images for report in reports),
        "seconds": round(seconds),
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "matched": sum(total.matched for total in totals),
        "not_alike": sum(total.wrong for total in totals),
        "excused": sum(total.borderline + total.nms_ties for total in totals),
        "max_box_px": f"{max(total.max_box_error for total in totals):.2g}",
        "max_score": f"{max(total.max_score_error for total in totals):.2g}",
        "worst_stage": worst.name,
        "worst_stage_limit_used": f"{worst.tolerance_used:.2g}",
    }


if __name__ == "__main__":
    main()
