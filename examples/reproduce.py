"""Cells of the DSKD paper's tables: ``python examples/reproduce.py table3 --data DIR``."""

from crossmodal.tables.reproduce import main

if __name__ == "__main__":
    raise SystemExit(main())
