"""Every method on one data set, beside the paper's column: ``python examples/compare.py mnist``."""

from __future__ import annotations

import sys

from crossmodal.cli import main

if __name__ == "__main__":
    sys.exit(main(kind="compare"))
