"""What several tests open and read: a recipe's images, and what a job left in its folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import data
from data.readers import READERS
from data.views import Views
from recipe import recipe
from store import key
from unpaired import Options

TINY = ""  # the file of the tiny recipe, while a test runs


def recipe_views(
    name: str = "tiny", root: Path | None = None, *, pseudo: str = "", **changes: Any
) -> Views:
    """The images of a recipe; ``unpaired-NAME`` gives its halves apart."""
    unpaired = name.startswith("unpaired-")
    known = name if name == "unpaired-eurosat" else name.removeprefix("unpaired-")
    known = TINY if known == "tiny" else known
    options = recipe(known, Options, **({"data": root} if root else {}) | changes)
    options.check()
    views = data.open_views(options, unpaired=unpaired, pseudo=pseudo)
    return views.loaded() if known == TINY else views


def class_counts(monkeypatch: pytest.MonkeyPatch, **known: int | tuple[str, ...]) -> None:
    """The data sets' published classes, for parts of them: no others are checked."""
    for name, reader in READERS.items():
        monkeypatch.setitem(READERS, name, replace(reader, classes=known.get(name)))


def results(out: Path) -> list[dict[str, Any]]:
    """The runs that are stored in a folder."""
    return list(json.loads((out / "results.json").read_text())["runs"])


def outcome(out: Path) -> tuple[dict[Any, Any], dict[str, str]]:
    """What a job came to, but for its seconds: results by run, and the checksums of all weights."""
    found = {}
    for run in results(out):
        trace = {
            k: v for k, v in run.get("trace", {}).items() if k not in ("rematching", "watching")
        }
        run = run | {"trace": trace, "seconds": None}
        found[run["method"], run["seed"], key(run["config"])] = run
    weights = {
        file.name: torch.load(file, weights_only=True)["sha256"] for file in out.glob("[!.]*.pt")
    }
    return found, weights


def damage(file: Path, kind: str, place: float = 0.5) -> None:
    """Harm a file at a share of its length."""
    content = bytearray(file.read_bytes())
    at = int(place * len(content))
    if kind == "gone":
        file.unlink()
    elif kind == "cut short":
        file.write_bytes(content[:at])
    elif kind == "empty":
        file.write_bytes(b"")
    else:
        content[at] ^= 1  # one bit
        file.write_bytes(content)
