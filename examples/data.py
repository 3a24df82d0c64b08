"""Look at images before training on them: ``python examples/data.py check NAME --data DIR``."""

from __future__ import annotations

import sys

from crossmodal.data.command import main

if __name__ == "__main__":
    sys.exit(main())
