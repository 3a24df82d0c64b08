"""Epochs of a training under way, so that it goes on after it was cut off."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from crossmodal.runs.processes import agreed
from crossmodal.runs.store import write_json

_KEPT = 2
SETTINGS, _MANIFEST, _EXTRA = "settings.json", "manifest.json", "extra.pt"


@dataclass
class Epochs:
    """The last two epochs in ``folder/epoch-N``: network, criterion, optimizer, random numbers.

    A folder is renamed into its place when it is whole, and has the checksum of each of its files.
    """

    folder: Path
    tell: Callable[[str], None]  # where to say that something could not be kept or read
    settings: dict[str, Any] | None = None  # what they depend on, for ``--resume``

    def save(self, accelerator: Accelerator, history: list[dict[str, float]]) -> None:
        """Keep the last epoch; where that fails the training goes on, and says so."""
        epoch = len(history)
        temporary, place = self.folder / f".{epoch}.part", self.folder / f"epoch-{epoch}"
        try:
            if accelerator.is_main_process:
                for old in (temporary, place):  # of a run that was cut off here
                    shutil.rmtree(old, ignore_errors=True)
                temporary.mkdir(parents=True)
                if self.settings is not None:
                    write_json(self.folder / SETTINGS, self.settings)
            accelerator.wait_for_everyone()
            accelerator.save_state(str(temporary), safe_serialization=False)
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                torch.save({"history": history}, temporary / _EXTRA)
                sums = {file.name: _sum(file) for file in sorted(temporary.iterdir())}
                (temporary / _MANIFEST).write_text(json.dumps(sums))
                temporary.replace(place)
                for old in self._found()[_KEPT:]:
                    shutil.rmtree(old)
        except (OSError, RuntimeError) as error:  # torch's writer raises either
            shutil.rmtree(temporary, ignore_errors=True)
            self.tell(f"epoch {epoch} could not be kept: {error}; training goes on")
        accelerator.wait_for_everyone()

    def resume(self, accelerator: Accelerator) -> list[dict[str, float]]:
        """Bring the training to the last whole epoch; its history, empty where nothing was kept.

        Where epochs were kept and all are damaged, it is a ValueError.
        """
        place = agreed(self._last_whole() if accelerator.is_main_process else None)
        if place is None:
            return []
        accelerator.load_state(place)
        kept = torch.load(Path(place) / _EXTRA, map_location="cpu", weights_only=True)
        return list(kept["history"])

    def clear(self) -> None:
        """Forget all epochs: the training is over and stored."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _last_whole(self) -> str | None:
        damaged = []
        for place in self._found():
            if (reason := _damage(place)) is None:
                return str(place)
            damaged.append(f"{place} is damaged ({reason})")
            self.tell(f"checkpoint {damaged[-1]}; going on from the one before")
        if damaged:
            fix = f"fix: delete {self.folder} to train from the start"
            raise ValueError(f"checkpoint {'; '.join(damaged)}; {fix}")
        return None

    def _found(self) -> list[Path]:
        return sorted(self.folder.glob("epoch-*"), key=lambda place: -int(place.name[6:]))


def _damage(place: Path) -> str | None:
    try:
        sums = json.loads((place / _MANIFEST).read_text())
        for name, wanted in sums.items():
            if _sum(place / name) != wanted:
                return f"{name} has another checksum"
    except (OSError, ValueError, AttributeError) as error:
        return str(error) or type(error).__name__
    return None


def _sum(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
