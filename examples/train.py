"""Distil a rich modality into a poor one: ``python examples/train.py mnist``."""

from crossmodal.cli import main

if __name__ == "__main__":
    raise SystemExit(main(kind="train"))
