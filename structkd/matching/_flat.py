"""An exact index that torch searches: what a flat gallery has on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from structkd.matching._store import Column

ROWS = 1 << 16  # rows of a block
_SCORES = 1 << 26  # scores of a block, 256 MB in float32


class TorchFlat:
    """Rows on a device, and the inner products of queries with all of them, block by block.

    It has the methods of FAISS's flat index that a gallery calls, by the same names and with the
    same NumPy arrays on the CPU, so that the gallery does not ask which of the two it has.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self._rows = Column(torch.empty(0, width, device=device))

    @property
    def ntotal(self) -> int:
        """The number of rows."""
        return len(self._rows)

    def add(self, rows: NDArray[np.float32]) -> None:
        """Adds rows ``(N, width)``."""
        self._rows.append(torch.from_numpy(rows).to(self._rows.value.device))

    def search(
        self, queries: NDArray[np.float32], k: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Returns the ``k <= ntotal`` largest inner products of every query, and their rows."""
        rows = self._rows.value
        asked = torch.from_numpy(queries).to(rows.device)
        scores = torch.empty(len(asked), k, device=rows.device)
        places = torch.empty(len(asked), k, dtype=torch.int64, device=rows.device)
        step = max(1, _SCORES // min(max(len(rows), 1), ROWS))
        with _true_float32(rows.device):
            for start in range(0, len(asked), step):
                part = slice(start, start + step)
                scores[part], places[part] = _best(asked[part], rows, k)
        return scores.cpu().numpy(), places.cpu().numpy()

    def remove_ids(self, places: NDArray[np.int64]) -> int:
        """Removes rows; those behind them move up."""
        rows = self._rows.value
        keep = torch.ones(len(rows), dtype=torch.bool)
        keep[torch.from_numpy(places)] = False
        self._rows = Column(rows[keep.to(rows.device)])
        return len(places)

    def reconstruct_n(self, start: int, count: int) -> NDArray[np.float32]:
        """Returns ``count`` rows from ``start`` on."""
        found: NDArray[np.float32] = self._rows.value[start : start + count].cpu().numpy()
        return found


def _best(queries: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns the ``k`` best of every query over all blocks of rows."""
    scores = queries.new_empty(len(queries), 0)
    places = torch.empty(len(queries), 0, dtype=torch.int64, device=rows.device)
    for start in range(0, len(rows), ROWS):
        block = rows[start : start + ROWS]
        more, place = (queries @ block.T).topk(min(k, len(block)), dim=1)
        scores, places = torch.cat([scores, more], 1), torch.cat([places, place + start], 1)
        scores, order = scores.topk(min(k, scores.shape[1]), dim=1)
        places = places.gather(1, order)
    return scores, places


@contextmanager
def _true_float32(device: torch.device) -> Iterator[None]:
    """Keeps TF32 and autocast away: the search bounds what float32 rounds, and no more."""
    matmul: Any = torch.backends.cuda.matmul
    # torch 2.9 renamed it, and refuses the old name once the new one was used.
    name, full = (
        ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
    )
    before = getattr(matmul, name)
    setattr(matmul, name, full)
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        setattr(matmul, name, before)
