"""The readers' tests open a recipe's images with a few options changed."""

from __future__ import annotations

from typing import Any

import data
from data.views import Views
from train import recipe
from unpaired import Options


def opened(name: str, *, pseudo: str = "", **changes: Any) -> Views:
    """The images of a recipe; ``unpaired-NAME`` gives its halves apart."""
    unpaired = name.startswith("unpaired-")
    known = name if name == "unpaired-eurosat" else name.removeprefix("unpaired-")
    options = recipe(known, Options, **changes)
    return data.open_views(options, unpaired=unpaired, pseudo=pseudo)
