"""Look at images before training on them: ``python examples/data check RECIPE --data DIR``.

``python examples/data show RECIPE --out FILE.png`` writes the first poor test image to a file, and
says its class: something for ``predict.py`` where the images come from a package.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from PIL import Image

from data import open_views
from data.check import check
from job import reported
from recipe import parsed
from unpaired import Options as UnpairedOptions


@dataclass(frozen=True)
class Options(UnpairedOptions):
    """Of any recipe, with pairs or without."""

    @classmethod
    def adapted(cls, values: dict[str, Any]) -> dict[str, Any]:
        return values


def main(arguments: Sequence[str] | None = None) -> int:
    """0, 1 where an image cannot be used, 2 after one line on stderr."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return reported(lambda: _checked(given))


def _checked(given: list[str]) -> int:
    if given[:1] == ["show"]:
        return _shown(parsed(given[1:], Options))
    if given[:1] != ["check"]:
        raise ValueError("usage: python examples/data check RECIPE --data DIR, or show ... --out")
    options = parsed(given[1:], Options)
    options.check()
    found = check(options)
    print("\n".join(found.lines))
    return int(found.bad > 0)


def _shown(options: Options) -> int:
    images = open_views(options).held_out_poor
    pixels = images.take(torch.zeros(1, dtype=torch.int64))[0]
    if options.out is None or pixels.dtype != torch.uint8 or len(pixels) not in (1, 3):
        raise ValueError("show writes images of 8 bits in one or three channels to --out FILE.png")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.permute(1, 2, 0).squeeze(-1).numpy()).save(options.out)
    print(f"{options.out}: {images.classes[int(images.labels[0])]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
