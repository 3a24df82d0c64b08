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
from crossmodal.errors import first_line

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


def write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(path, lambda file: file.write_text(text))


def save_tensors(content: Any, path: Path) -> None:
    """``torch.save`` in one piece; of a disk that is full it says what other writers say of it.

    Raises:
        OSError: the file could not be written.
    """
    try:
        write_atomically(path, lambda temporary: torch.save(content, temporary))
    except RuntimeError as error:  # torch's own writer raises this
        raise OSError(f"torch cannot write {path} ({first_line(error)})") from error


def lock(folder: Path, name: str) -> FileLock:
    """A lock of this folder; the system frees it when its holder dies."""
    (folder / LOCKS).mkdir(parents=True, exist_ok=True)
    return FileLock(folder / LOCKS / f"{slug(name)}.lock")


def slug(name: str) -> str:
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
    """

    folder: Path
    role: str  # teacher, matcher, or student with method and seed
    settings: dict[str, Any]  # all that the weights depend on; plain JSON values

    @property
    def name(self) -> str:
        """``<role>-<model>-<key>``."""
        return slug(f"{self.role}-{self.settings.get('model', '')}-{key(self.settings)}")

    @property
    def path(self) -> Path:
        return self.folder / f"{self.name}.pt"

    def save(self, model: nn.Module) -> None:
        """Write the weights, their checksum and the settings."""
        weights = model.state_dict()
        content = {"weights": weights, "sha256": digest(weights), "settings": self.settings}
        save_tensors(content, self.path)

    def load_into(self, model: nn.Module) -> bool:
        """Load the weights if they are there; ValueError if damaged or of other settings."""
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
            raise self._refused(f"is damaged ({type(error).__name__})") from error
        if settings != self.settings:
            others = ", ".join(differing(settings, self.settings))
            raise self._refused(f"was made with another {others}")
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise self._refused(f"does not fit {type(model).__name__}") from error
        return True

    def _refused(self, reason: str) -> ValueError:
        return ValueError(f"checkpoint {self.path} {reason}; fix: move it away and run again")


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

    Runs of other settings stay in the file; a run is known by method, seed and settings. A file
    that is there and is none is a ValueError.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / RESULTS
        self.runs()

    def runs(self) -> list[dict[str, Any]]:
        return list(self._content().get("runs", []))

    def find(self, method: str, seed: int, config: dict[str, Any]) -> dict[str, Any] | None:
        """The finished run of these settings, or None."""
        wanted = (method, seed, key(config))
        return next((run for run in self.runs() if _identity(run) == wanted), None)

    def write(self, header: dict[str, Any], *new: dict[str, Any]) -> None:
        """Write the header's entries and new runs; the others stay as they are."""
        replaced = {_identity(run) for run in new}
        with lock(self.folder, RESULTS):
            old = self._content()
            commands = [c for c in old.get("commands", []) if c != header.get("command")]
            kept = [run for run in old.get("runs", []) if _identity(run) not in replaced]
            commands.append(header.get("command"))
            more = {"commands": commands, "versions": versions(), "runs": [*kept, *new]}
            write_json(self.path, {**header, **more})

    def _content(self) -> dict[str, Any]:
        if not self.path.exists():
            return {}
        try:
            content = json.loads(self.path.read_text())
            for run in content["runs"]:
                _identity(run)
                if "accuracy" not in run and "failed" not in run:
                    raise KeyError("accuracy")
            return dict(content)
        except (ValueError, KeyError, TypeError) as error:
            told = f"{self.path} is damaged ({error!r}); fix: move it away and run again"
            raise ValueError(told) from error


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version(), "structkd": structkd.__version__}
    return found | {name: metadata.version(name) for name in _PACKAGES}


def _identity(run: dict[str, Any]) -> tuple[str, int, str]:
    return run["method"], run["seed"], key(run["config"])
