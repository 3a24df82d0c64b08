"""DSLoss's candidates on a validation split: ``python examples/sweep.py mnist --group gamma``."""

from __future__ import annotations

import sys

from crossmodal.cli import main

if __name__ == "__main__":
    sys.exit(main(kind="sweep"))
