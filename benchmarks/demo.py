"""Append what a demo reached to ``results/demo.csv``.

make demo && .venv/bin/python benchmarks/demo.py demo
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from record import append_row


def main() -> None:
    """One row from the ``demo.json`` in the folder that the command line names."""
    if len(sys.argv) != 2:
        sys.exit("usage: python benchmarks/demo.py DEMO_FOLDER")
    report = json.loads((Path(sys.argv[1]) / "demo.json").read_text(encoding="utf-8"))
    seconds, accuracy = report["seconds"], report["evaluation"]
    path = append_row(
        "demo",
        "make demo",
        {
            "seconds": round(sum(seconds.values())),
            "train_s": round(seconds["train"]),
            "map50": round(accuracy["map50"], 4),
            "voc07": round(accuracy["voc07"], 4),
            "map": round(accuracy["map"], 4),
            "detect_fps": round(report["detect"]["fps"], 1),
        },
    )
    print(path)


if __name__ == "__main__":
    main()
