"""What a folder takes over from the folders near it: whatever is finished, of the very settings."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from crossmodal.runs.store import Checkpoint, Results, write_atomically


def taken(wanted: Checkpoint, near: Sequence[Path], into: nn.Module) -> Path | None:
    """Load weights from the first folder that has them; where they lie, or None.

    Raises:
        ValueError: they are damaged or of other settings.
    """
    for folder in near:
        found = replace(wanted, folder=folder)
        if found.load_into(into):
            return found.path
    return None


def taken_run(
    near: Sequence[Path], method: str, seed: int, config: dict[str, Any]
) -> tuple[Path | None, dict[str, Any] | None]:
    """A run of these settings that did not fail, and the folder that has it.

    Raises:
        ValueError: a folder's results are damaged.
    """
    for folder in near:
        run = Results(folder).find(method, seed, config)
        if run is not None and "failed" not in run:
            return folder, run
    return None, None


def taken_history(wanted: Checkpoint, folder: Path) -> None:
    """Copy the epochs of a network from the folder that it is taken over from."""
    name = Path("history") / f"{wanted.name}.csv"
    if (folder / name).exists():
        write_atomically(wanted.folder / name, lambda path: shutil.copyfile(folder / name, path))
