"""The teacher samples that are right and sure, for matches that teach."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from structkd._checks import describe, labels, number, whole
from structkd.matching._store import by_class


@torch.no_grad()
def reliable_teachers(
    logits: Tensor,
    target: Tensor,
    *,
    entropy: float = 0.5,
    temperature: float = 1.0,
    at_least: int = 1,
) -> Tensor:
    r"""Chooses the teacher samples that a student may be matched with because they can teach it.

    Dynamic matching gives a student the teacher sample whose prediction is nearest to its own. An
    unsure student thus gets one of the few that are unsure too, or wrong, and learns nothing from
    it. A gallery of these alone does not have them. With
    :math:`p_j = \mathrm{softmax}(t_j / T)` and labels :math:`y_j` of K classes, class c keeps

    .. math::
        \{ j : y_j = c, \; \arg\max p_j = c, \; H(p_j) \le \eta \log K \}
        \cup \mathrm{top}_m \{ p_{jc} : y_j = c \}

    Together with a planner, which gives each a bounded share of the students, these are dynamic
    matches of teachers that are right, sure and many. Published SemBridge is the gallery of all.

    Args:
        logits: The teacher's of its whole set, ``(M, K)``, floating point.
        target: Its classes ``(M,)`` int64; a row of -100 is kept in no class.
        entropy: eta in [0, 1], the most entropy as a share of what is possible.
        temperature: T > 0.
        at_least: m >= 0, how many of a class are kept in any case, those that say its label most
            strongly. With 0 a class that the teacher never gets right is gone from the gallery.

    Returns:
        Their positions, rising, ``(N,)`` int64 on the CPU: rows for ``RetrievalGallery.add(
        logits[kept], target[kept], ids=kept)``.

    Raises:
        TypeError, ValueError: If an argument has the wrong type, shape or range.

    References:
        Dynamic matching is Wei et al.'s, *Asymmetric Cross-Modal Knowledge Distillation*, AAAI
        2026. The choice is ours.

    Example:
        >>> logits = torch.tensor([[9.0, 0.0], [0.1, 0.0], [0.0, 9.0], [0.0, 9.0]])
        >>> reliable_teachers(logits, torch.tensor([0, 0, 1, 0]))  # right, unsure, right, wrong
        tensor([0, 2])
    """
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.dim() != 2:
        raise TypeError(f"logits must be floating point (M, K), got {describe(logits)}")
    share = number("entropy", entropy, at_least=0, at_most=1)
    tau, fewest = (
        number("temperature", temperature, above=0),
        whole("at_least", at_least, at_least=0),
    )
    logits = logits.cpu().double()
    if not bool(logits.isfinite().all()):
        raise ValueError(
            "logits must be finite, got NaN or infinity: has the teacher been trained?"
        )
    target = target.cpu() if isinstance(target, Tensor) else target
    index, labelled = labels(target, *logits.shape, reader="reliable_teachers")
    log_p = torch.log_softmax(logits / tau, dim=1)
    own = log_p.gather(1, index[:, None])[:, 0]
    right = own >= log_p.amax(dim=1)
    sure = -(log_p.exp() * log_p).sum(dim=1) <= share * math.log(logits.shape[1])
    kept = right & sure & labelled
    for _, members in by_class(index.masked_fill(~labelled, -1)):
        if fewest and bool(labelled[members[0]]):
            strongest = own[members].argsort(descending=True, stable=True)[:fewest]
            kept[members[strongest]] = True
    return kept.nonzero()[:, 0]
