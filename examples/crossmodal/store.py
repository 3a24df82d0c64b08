"""What a run leaves in ``--out``: checkpoints and results.json, each file whole or not there."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

import structkd

RESULTS = "results.json"
_PACKAGES = ("torch", "timm", "numpy")


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` on a temporary file beside ``path`` and rename it: never half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last: matplotlib reads the format from it.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def key(settings: dict[str, Any]) -> str:
    """Eight hex digits that stand for ``settings``."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Checkpoint:
    """A network's weights in a file named after everything that they depend on.

    Other settings make another name, so no checkpoint is ever overwritten by a different one.

    Attributes:
        folder: where it lies.
        role: ``teacher``, or ``student`` with method and seed.
        settings: all that the weights depend on; plain JSON values.
    """

    folder: Path
    role: str
    settings: dict[str, Any]

    @property
    def path(self) -> Path:
        """``<folder>/<role>-<model>-<key>.pt``."""
        model = re.sub(r"[^\w.]+", "_", str(self.settings.get("model", "")))
        return self.folder / f"{self.role}-{model}-{key(self.settings)}.pt"

    def save(self, model: nn.Module, **facts: float) -> None:
        """Write the weights, the settings, and facts such as the seconds it took."""
        content = {"weights": model.state_dict(), "settings": self.settings, "facts": facts}
        write_atomically(self.path, lambda path: torch.save(content, path))

    def load_into(self, model: nn.Module) -> bool:
        """Load the weights if the file is there; tells whether it was.

        Raises:
            ValueError: the file is damaged, or its content belongs to other settings.
        """
        if not self.path.exists():
            return False
        try:
            content = torch.load(self.path, map_location="cpu", weights_only=True)
            settings, weights = content["settings"], content["weights"]
        except OSError:
            raise
        except Exception as error:  # the unpickler raises almost anything on damaged bytes
            raise ValueError(
                f"checkpoint {self.path} is damaged ({type(error).__name__}); "
                "fix: delete it and run again"
            ) from error
        if settings != self.settings:
            differing = sorted(
                name
                for name in {*settings, *self.settings}
                if settings.get(name) != self.settings.get(name)
            )
            raise ValueError(
                f"checkpoint {self.path} was made with another {', '.join(differing)}; "
                "fix: move it away and run again"
            )
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(
                f"checkpoint {self.path} does not fit {type(model).__name__}; "
                "fix: delete it and run again"
            ) from error
        return True


class Results:
    """``results.json``: every finished run with its settings; written again after each run.

    Runs of other settings stay in the file; a run is known by method, seed and settings.

    Raises:
        ValueError: the file exists and is no results file.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / RESULTS
        self._runs: list[dict[str, Any]] = []
        if self.path.exists():
            try:
                self._runs = list(json.loads(self.path.read_text())["runs"])
                for run in self._runs:
                    _identity(run)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.path} is damaged ({error!r}); fix: move it away and run again"
                ) from error

    def find(self, method: str, seed: int, config: dict[str, Any]) -> dict[str, Any] | None:
        """The finished run of these settings, or None."""
        wanted = (method, seed, key(config))
        return next((run for run in self._runs if _identity(run) == wanted), None)

    def add(self, run: dict[str, Any], *, header: dict[str, Any]) -> None:
        """Put a finished run in, in place of one of the same settings, and write the file."""
        self._runs = [old for old in self._runs if _identity(old) != _identity(run)] + [run]
        self.write(header)

    def write(self, header: dict[str, Any]) -> None:
        """Write the file: the header's entries, the versions, the runs."""
        content = {**header, "versions": versions(), "runs": self._runs}
        text = json.dumps(content, indent=2) + "\n"
        write_atomically(self.path, lambda path: path.write_text(text))


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version(), "structkd": structkd.__version__}
    return found | {name: metadata.version(name) for name in _PACKAGES}


def _identity(run: dict[str, Any]) -> tuple[str, int, str]:
    return run["method"], run["seed"], key(run["config"])
