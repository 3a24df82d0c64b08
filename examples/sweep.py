"""DSLoss's candidates on a validation split: ``python examples/sweep.py mnist --group gamma``."""

from crossmodal.cli import main

if __name__ == "__main__":
    raise SystemExit(main(kind="sweep"))
