"""Look at images before training on them: ``python examples/data check NAME --data DIR``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from data.check import check  # noqa: E402
from train import parsed, reported  # noqa: E402


def main(arguments: Sequence[str] | None = None) -> int:
    """0, 1 where an image cannot be used, 2 after one line on stderr."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return reported(lambda: _checked(given))


def _checked(given: list[str]) -> int:
    if given[:1] != ["check"]:
        raise ValueError("usage: python examples/data check RECIPE --data DIR")
    found = check(parsed(given[1:]))
    print("\n".join(found.lines))
    return int(found.bad > 0)


if __name__ == "__main__":
    sys.exit(main())
