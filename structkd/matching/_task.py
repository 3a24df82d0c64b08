"""The task's own loss on the rows of a batch that have a label."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from structkd._checks import NO_LABEL, check_rows, describe, labels
from structkd._devices import sent
from structkd.criteria._rows import mean_of_sums

Task: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def known_labels(
    task: Task | None, logits: Tensor, target: Tensor, labelled: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Returns the target, -100 where a row has no label, and which rows have one, None for all.

    Args:
        task: What will read the target; the cross-entropy where there is none.
        logits: ``(B, K)``.
        target: Class indices ``(B,)``, or whatever the task takes, ``(B, ...)``.
        labelled: The rows that have a label, a mask or positions, as the caller gave them.
    """
    batch, classes = logits.shape
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor, got {describe(target)}")
    if task is None and target.is_floating_point():
        if target.shape != logits.shape:
            raise ValueError(
                f"target probabilities must have shape {tuple(logits.shape)}, got "
                f"{tuple(target.shape)}"
            )
    elif task is None:
        labels(target, batch, classes, reader="BridgeLoss")
    elif target.dim() == 0 or len(target) != batch:
        raise ValueError(f"target must hold {batch} rows as the logits do, got {describe(target)}")
    chosen = None if labelled is None else _mask(labelled, batch, logits.device)
    if target.dim() > 1 or target.is_floating_point():
        return target, chosen
    target = target.long()
    known = target != NO_LABEL
    known = known if chosen is None else known & chosen
    return torch.where(known, target, NO_LABEL), known


def task_loss(
    task: Task | None, logits: Tensor, target: Tensor, known: Tensor | None, *, gather: bool
) -> Tensor:
    """Returns the mean over the rows that have a label, 0 where none has, in float32 at least."""
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if task is not None:
            rows = slice(None) if known is None else known.nonzero()[:, 0]
            total = _by_row(task, logits[rows], target[rows]).sum()
        elif target.is_floating_point():
            wanted = target.to(logits.dtype)
            if known is not None:  # chosen by zeros: to count them would wait for the device
                wanted = torch.where(known[:, None], wanted, 0)
            costs = F.cross_entropy(logits, wanted, reduction="none")
            total = (costs if known is None else torch.where(known, costs, 0)).sum()
        else:
            total = F.cross_entropy(logits, target, ignore_index=NO_LABEL, reduction="sum")
        count = total.new_full((), len(logits)) if known is None else known.sum()
        return mean_of_sums(total, count, gather=gather)


def _by_row(task: Task, logits: Tensor, target: Tensor) -> Tensor:
    costs: object = task(logits, target)
    if not isinstance(costs, Tensor) or costs.dim() == 0 or len(costs) != len(logits):
        raise ValueError(
            f"task must return a loss a row, ({len(logits)},) or ({len(logits)}, ...), got "
            f"{describe(costs)}: build it with reduction='none'"
        )
    return costs.flatten(1).mean(dim=1) if costs.dim() > 1 else costs


def _mask(labelled: Tensor, batch: int, device: torch.device) -> Tensor:
    check_rows(labelled, "labelled", batch)
    if labelled.dtype == torch.bool:
        return sent(labelled, device)
    mask = torch.zeros(batch, dtype=torch.bool, device=device)
    return mask.index_fill(0, sent(labelled.long(), device), True)
