"""What stays in ``--out``: finished networks and results.json, each file whole or not there.

Several processes may work in one folder: each run and each file is written by the holder of its
lock, and results of others are read again before any are written.
"""

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
from filelock import FileLock
from torch import Tensor, nn

import structkd

RESULTS, LOCKS = "results.json", ".locks"
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


def lock(folder: Path, name: str) -> FileLock:
    """A lock of this folder; the system frees it when its holder dies."""
    (folder / LOCKS).mkdir(parents=True, exist_ok=True)
    return FileLock(folder / LOCKS / f"{slug(name)}.lock")


def slug(name: str) -> str:
    """A name as part of a file's."""
    return re.sub(r"[^\w.+=-]+", "_", name).strip("_")


def key(settings: dict[str, Any]) -> str:
    """Eight hex digits that stand for ``settings``."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def digest(weights: dict[str, Tensor]) -> str:
    """A checksum of names, shapes and bytes."""
    found = hashlib.sha256()
    for name, value in weights.items():
        found.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        found.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@dataclass(frozen=True)
class Checkpoint:
    """A finished network's weights in a file named after everything that they depend on.

    Other settings make another name, so no checkpoint is ever overwritten by a different one.

    Attributes:
        folder: where it lies.
        role: ``teacher``, ``matcher``, or ``student`` with method and seed.
        settings: all that the weights depend on; plain JSON values.
    """

    folder: Path
    role: str
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        """``<role>-<model>-<key>``."""
        return slug(f"{self.role}-{self.settings.get('model', '')}-{key(self.settings)}")

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / f"{self.name}.pt"

    def save(self, model: nn.Module, **facts: float) -> None:
        """Write the weights, their checksum, the settings, and facts such as the seconds."""
        weights = model.state_dict()
        content = {
            "weights": weights,
            "sha256": digest(weights),
            "settings": self.settings,
            "facts": facts,
        }
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
            if digest(weights) != content["sha256"]:
                raise ValueError("its checksum is another")
        except OSError:
            raise
        except Exception as error:  # the unpickler raises almost anything on damaged bytes
            raise ValueError(
                f"checkpoint {self.path} is damaged ({type(error).__name__}); "
                "fix: delete it and run again"
            ) from error
        if settings != self.settings:
            raise ValueError(
                f"checkpoint {self.path} was made with another "
                f"{', '.join(differing(settings, self.settings))}; fix: move it away and run again"
            )
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(
                f"checkpoint {self.path} does not fit {type(model).__name__}; "
                "fix: delete it and run again"
            ) from error
        return True


def differing(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Names under which two settings differ, those of inner ones with a dot."""
    found = []
    for name in sorted({*first, *second}):
        one, two = first.get(name), second.get(name)
        if isinstance(one, dict) and isinstance(two, dict):
            found += [f"{name}.{inner}" for inner in differing(one, two)]
        elif one != two:
            found.append(name)
    return found


class Results:
    """``results.json``: every finished run with its settings; written again after each run.

    Runs of other settings stay in the file; a run is known by method, seed and settings.

    Raises:
        ValueError: the file exists and is no results file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / RESULTS
        self.runs()

    def runs(self) -> list[dict[str, Any]]:
        """All finished runs, those of other processes included."""
        return list(self._content().get("runs", []))

    def find(self, method: str, seed: int, config: dict[str, Any]) -> dict[str, Any] | None:
        """The finished run of these settings, or None."""
        wanted = (method, seed, key(config))
        return next((run for run in self.runs() if _identity(run) == wanted), None)

    def add(self, run: dict[str, Any], *, header: dict[str, Any]) -> None:
        """Put a finished run in, in place of one of the same settings, and write the file."""
        self._update(
            header, lambda runs: [r for r in runs if _identity(r) != _identity(run)] + [run]
        )

    def write(self, header: dict[str, Any]) -> None:
        """Write the header's entries; the runs stay as they are."""
        self._update(header, lambda runs: runs)

    def _update(
        self,
        header: dict[str, Any],
        change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]],
    ) -> None:
        with lock(self.folder, RESULTS):
            old = self._content()
            commands = [c for c in old.get("commands", []) if c != header.get("command")]
            content = {
                **header,
                "commands": [*commands, header.get("command")],
                "versions": versions(),
                "runs": change(old.get("runs", [])),
            }
            text = json.dumps(content, indent=2) + "\n"
            write_atomically(self.path, lambda path: path.write_text(text))

    def _content(self) -> dict[str, Any]:
        if not self.path.exists():
            return {}
        try:
            content = json.loads(self.path.read_text())
            for run in content["runs"]:
                _identity(run)
            return dict(content)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.path} is damaged ({error!r}); fix: move it away and run again"
            ) from error


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version(), "structkd": structkd.__version__}
    return found | {name: metadata.version(name) for name in _PACKAGES}


def _identity(run: dict[str, Any]) -> tuple[str, int, str]:
    return run["method"], run["seed"], key(run["config"])
