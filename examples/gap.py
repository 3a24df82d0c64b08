"""How far free pairs may be: ``python examples/gap.py unpaired-mnist --pseudo noise:0.7 grey``."""

from crossmodal.tables.gap import main

if __name__ == "__main__":
    raise SystemExit(main())
