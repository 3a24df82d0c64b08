"""Distil a clean modality into a noisy one: ``python examples/train.py mnist``."""

from __future__ import annotations

import os
import sys


def run() -> int:
    """Set what torch reads when it is imported, then hand over to the command line."""
    # By default OpenMP threads spin while they wait: on shared cores that made small networks train
    # 25 times slower than threads that sleep.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from crossmodal.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(run())
