"""The readers' tests open a recipe's images with a few options changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import data
from data.views import Views
from recipe import recipe
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
    views = data.open_views(options, unpaired=unpaired, pseudo=pseudo)
    return views.loaded() if known == TINY else views
