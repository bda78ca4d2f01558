"""``python -m anchorline``: the same as the command ``anchorline``."""

from __future__ import annotations

import sys

from anchorline.cli import main

if __name__ == "__main__":
    sys.exit(main())
