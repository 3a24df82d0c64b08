"""The ids of a gallery's samples: which row has which, and which rows are free."""

from __future__ import annotations

import torch
from torch import Tensor

from structkd.matching._store import Column

_NONE = -1


class IdTable:
    """Rows by id, for ids that come and go in any order.

    Ids lie in sorted runs, each more than twice as long as the next: N of them in any number of
    calls are merged O(log N) times each, and an id is sought in O(log N) runs. A run may name a row
    that has another id by now: the rows' own ids tell, and merging leaves such names out.
    """

    def __init__(self, ids: Tensor | None = None, following: int = 0) -> None:
        ids = torch.empty(0, dtype=torch.int64) if ids is None else ids
        self._ids = Column(ids)
        self._free = (ids == _NONE).nonzero()[:, 0]
        rows = (ids != _NONE).nonzero()[:, 0]
        known, order = ids[rows].sort()
        self._runs = [(known, rows[order])] if len(rows) else []
        self.following = following  # the id that comes next by default

    def __len__(self) -> int:
        return len(self._ids) - len(self._free)

    @property
    def value(self) -> Tensor:
        """The id of every row, -1 where it is free."""
        return self._ids.value

    def find(self, ids: Tensor) -> Tensor:
        """Returns the rows of ids, -1 for an unknown one."""
        found = torch.full_like(ids, _NONE)
        for known, rows in self._runs:
            place = torch.searchsorted(known, ids).clamp(max=len(known) - 1)
            row = rows[place]
            found = torch.where((known[place] == ids) & (self.value[row] == ids), row, found)
        return found

    def add(self, ids: Tensor) -> Tensor:
        """Gives new ids a row each, free ones first, and returns the rows."""
        reused = self._free[: len(ids)]
        self._free = self._free[len(reused) :]
        start = len(self._ids)
        rows = torch.cat([reused, torch.arange(start, start + len(ids) - len(reused))])
        self._ids.write(rows, ids)
        if len(ids):
            self.following = max(self.following, int(ids.max()) + 1)
            ordered, order = ids.sort()
            self._runs.append((ordered, rows[order]))
        while len(self._runs) > 1 and len(self._runs[-2][0]) <= 2 * len(self._runs[-1][0]):
            known, at = (torch.cat(parts) for parts in zip(*self._runs[-2:], strict=True))
            valid = self.value[at] == known
            ordered, order = known[valid].sort()
            # What was added last is valid, so that no run is empty.
            self._runs[-2:] = [(ordered, at[valid][order])]
        return rows

    def free(self, rows: Tensor) -> None:
        """Takes rows their ids."""
        self._ids.write(rows, torch.full_like(rows, _NONE))
        self._free = torch.cat([self._free, rows])

    def share(self) -> Tensor:
        """The ids of all rows, which later changes leave as they are."""
        return self._ids.share()
