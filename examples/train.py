"""Distil a rich modality into a poor one: ``python examples/train.py mnist``."""

from __future__ import annotations

import sys

from crossmodal.cli import main

if __name__ == "__main__":
    sys.exit(main(kind="train"))
