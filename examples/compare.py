"""Every method on one data set, beside the paper's column: ``python examples/compare.py mnist``."""

from crossmodal.cli import main

if __name__ == "__main__":
    raise SystemExit(main(kind="compare"))
