"""One detector for many callers, as behind a server: python examples/threaded_app.py model.engine images/

A ``Detector`` may be called from any number of threads. ``workers`` of them are served at once, on a GPU
each with buffers of its own; the others wait their turn.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from anchorline.runtime import Detector, find_images, read_image


def main(model: str, folder: str) -> None:
    with Detector(model, workers=2) as detector, ThreadPoolExecutor(8) as pool:

        def handle(path: Path) -> str:
            detections = detector(read_image(path))
            return f"{path.name}: {len(detections)} found"

        for answer in pool.map(handle, find_images(Path(folder))):
            print(answer)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
