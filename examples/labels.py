"""What few labels do: ``python examples/labels.py mnist --labels 100 400 all --amount 0.7``."""

from crossmodal.tables.labels import main

if __name__ == "__main__":
    raise SystemExit(main())
