"""One loss for a mixed batch, of which each row may or may not have a label, a pair, a match."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from structkd._checks import NO_LABEL, describe
from structkd.criteria._fields import Input, as_features, missing
from structkd.criteria._weights import Weighted
from structkd.criteria.base import Criterion
from structkd.features import Features
from structkd.matching._share import ARGUMENTS, Share, share_of, sizes_of, terms_of
from structkd.matching._task import Task, known_labels, task_loss
from structkd.specs import build_criterion


class BridgeLoss(Weighted):
    r"""The loss of a mixed batch: each row may or may not have a label, a pair, a match.

    Where nothing is paired, the teacher's images made poor are *free pairs*: labelled, aligned to
    the pixel, and what paired criteria want. A batch then mixes them with the student's own images.
    The student sees all rows in one forward pass, so that batch normalisation does too. With
    :math:`\mathcal{Y}`, :math:`\mathcal{P}` and :math:`\mathcal{M}` the rows that have a label, a
    pair, a match,

    .. math::
        L = \frac{w_{task}}{|\mathcal{Y}|} \sum_{b \in \mathcal{Y}} \ell(s_b, y_b)
            + w_{pair} \, L_{pair}(s_\mathcal{P}, t_\mathcal{P})
            + w_{match} \, L_{match}(s_\mathcal{M}, t_\mathcal{M})

    Each criterion is given its own rows and no others, with their labels and their ``index``. A
    part without any row costs exactly 0, with a gradient of 0 for what its criterion trains: a
    batch of own images alone is the lone student's step to the last bit.

    Under ``gather`` all three are those of the whole batch of all processes, whatever number of
    rows each holds of a kind, none included. A criterion that compares samples gathers them. Of any
    other, L is the mean over rows, so

    .. math:: L = \frac{1}{\sum_r n_r} \sum_r n_r L_r

    with :math:`n_r` rows on rank r. Value and gradient under ``DistributedDataParallel`` equal the
    single-process run, but for heads with a batch norm of their own. A criterion of one's own is
    called with zero rows on a rank that has none: what it does there must not fail.

    Where the pairs' images have several labels and the student's own only one (M2S-GL), one task
    serves both: make every target a row of K numbers. The default cross-entropy takes rows of
    probabilities, where the labels of an image share its mass; for independent labels take
    ``nn.BCEWithLogitsLoss(reduction="none")`` and rows of 0 and 1.

    Terms: ``task``, and the criteria's own after ``pair/`` and ``match/``, all with their weights.

    Args:
        pair: The criterion of the rows that have a pair; none leaves pairs to their labels, which
            is the fair baseline of every criterion.
        match: The criterion of the rows that have a match.
        task: Function or module of (logits, target) of the rows with a label, that returns a loss a
            row, ``reduction="none"``; cross-entropy by default.
        task_weight: Of the task's loss; with 0 the target may be left out.
        pair_weight: Of the pairs' criterion.
        match_weight: Of the matches' criterion. :meth:`set_weight` changes any of the three from
            step to step, :func:`falling` gives a schedule.
        gather: Compute on the whole batch of all processes, by all of the criteria inside, too. It
            is on where one of them has it on, and where one trains by all processes in any case, as
            :class:`ContrastiveRepresentationLoss` does, for which the others would wait in vain on
            a process without a row. A criterion that holds a ``SyncBatchNorm`` needs it on for the
            same reason.

    Shape:
        the student's features of the whole batch, logits ``(B, K)``, any float dtype; the teacher's
        of the pairs alone, ``(n, ...)``, in their order; target ``(B,)`` int64 in ``[0, K)`` or
        -100, or ``(B, K)`` floating point; masks ``(B,)`` bool, or int64 positions ``(n,)``. Output
        a scalar in float32 (float64 for float64 inputs).

    Raises:
        ValueError: If a mask has another length than the batch, the teacher's features do not hold
            a row for each pair, features are missing though rows have a pair, fewer rows have one
            than its criterion compares, the target is missing or out of range, or as a criterion
            raises.
        TypeError: If an argument has the wrong type, or a mask the wrong dtype.

    References:
        The free pairs are those of Wei et al., *Asymmetric Cross-Modal Knowledge Distillation:
        Bridging Modalities with Weak Semantic Consistency*, AAAI 2026, who train a matcher on them.
        To distil over them is ours.

    Example:
        >>> import structkd
        >>> bridge = BridgeLoss(structkd.KDLoss(), pair_weight=0.5)
        >>> own, poor = torch.randn(3, 10), torch.randn(2, 10)  # the student's logits of one batch
        >>> feats_s = Features(logits=torch.cat([own, poor]).requires_grad_())
        >>> feats_t = Features(logits=torch.randn(2, 10))  # the teacher's, of the rich images
        >>> target = torch.tensor([4, -100, 1, 7, 2])  # own image 1 has no label
        >>> terms = bridge.terms(feats_s, feats_t, target, paired=torch.tensor([3, 4]))
        >>> list(terms)
        ['task', 'pair/KD']
        >>> sum(terms.values()).backward()

        With a :class:`Distiller`, which runs the teacher on the pairs alone:

        >>> net = lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 10))
        >>> distiller = structkd.Distiller(net(), net(), BridgeLoss(structkd.KDLoss()))
        >>> x, rich, paired = torch.randn(5, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.arange(3, 5)
        >>> logits, terms = distiller(x, target, rich, paired=paired)
        >>> sum(terms.values()).backward()
    """

    reads = ("logits",)
    build_options: ClassVar[tuple[str, ...]] = tuple(ARGUMENTS)

    def __init__(
        self,
        pair: Criterion | None = None,
        match: Criterion | None = None,
        *,
        task: Task | None = None,
        task_weight: float = 1.0,
        pair_weight: float = 1.0,
        match_weight: float = 1.0,
        gather: bool = False,
    ) -> None:
        super().__init__(gather=gather)
        for name, part in (("pair", pair), ("match", match)):
            if part is not None and not isinstance(part, Criterion):
                raise TypeError(
                    f"{name} must be a structkd.Criterion or None, got {describe(part)}"
                )
        if task is not None and (isinstance(task, Criterion) or not callable(task)):
            raise TypeError(
                "task must be a function or module of (logits, target) that returns a loss a row, "
                f"got {describe(task)}; leave it out for the cross-entropy"
            )
        self.pair, self.match, self.task = pair, match, task
        self._weigh({"task": task_weight, "pair": pair_weight, "match": match_weight})
        self._needs_target = task_weight != 0
        inner = [module for module in self.modules() if isinstance(module, Criterion)]
        self.gather = gather or any(part.gather or part.collective for part in inner)
        for criterion in inner:
            criterion.gather = self.gather

    @classmethod
    def arguments(
        cls, feats_s: Features, feats_t: Features, options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Builds ``pair`` and ``match`` from what :func:`build_criterion` takes, dicts or names."""
        given = {name: options.get(name) for name in ARGUMENTS}
        return {
            name: None if spec is None else build_criterion(spec, feats_s, feats_t)
            for name, spec in given.items()
        }

    def set_weight(self, name: str, weight: float) -> None:
        """Changes the weight of a part; with a task's that is not 0, the target is needed again.

        Raises:
            ValueError: If there is no such part, or the weight is not finite.
        """
        super().set_weight(name, weight)
        if name == "task":
            self._needs_target = weight != 0

    def forward(
        self,
        student: Input,
        teacher: Input | None = None,
        target: Tensor | None = None,
        **rows: Any,
    ) -> Tensor:
        """Returns the scalar sum of :meth:`terms`, which says what it takes."""
        return torch.stack(list(self.terms(student, teacher, target, **rows).values())).sum()

    def terms(
        self,
        student: Input,
        teacher: Input | None = None,
        target: Tensor | None = None,
        *,
        labelled: Tensor | None = None,
        paired: Tensor | None = None,
        matches: Input | None = None,
        matched: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Returns the named parts whose sum :meth:`forward` returns.

        Args:
            student: The student's features of the whole batch.
            teacher: The teacher's of the rows that have a pair, in their order; none where no row
                has one. Where processes differ, features of zero rows: ``feats.rows(none)``.
            target: The labels. A row of int64 -100 has none.
            labelled: Which rows have a label; all that are not -100 by default.
            paired: Which rows have a pair: a mask, or positions in the order of ``teacher``. All by
                default, if ``teacher`` is given. On an accelerator leave masks on the CPU, or give
                positions, so that nothing waits.
            matches: The teacher's features of the rows that have a match, such as a matcher gives;
                for a criterion that reads none of them, :class:`ClassMeanKDLoss`, not needed.
            matched: Which rows have a match; all by default, if ``matches`` is given.

        Returns:
            Scalars by name, weights included. Parts without any row are left out.
        """
        student = as_features(student, "student", self)
        logits = student.logits
        if logits is None:
            raise ValueError(missing("BridgeLoss", "student.logits", student, "logits"))
        self._check_tensor(logits, "student.logits", "logits")
        if target is None and self._needs_target:
            raise ValueError(
                "BridgeLoss needs target, the labels of the whole batch with "
                f"{NO_LABEL} where a row has none: pass it as 3rd argument, or build the loss with "
                "task_weight=0"
            )
        weights = self._present()
        found: dict[str, Tensor] = {}
        if target is not None:
            target, known = known_labels(self.task, logits, target, labelled)
            value = task_loss(self.task, logits, target, known, gather=self.gather)
            found["task"] = weights["task"].to(value.dtype) * value
        shares = self._shares(student, target, pair=(teacher, paired), match=(matches, matched))
        idle: list[nn.Parameter] = []
        for share, sizes in zip(
            shares, sizes_of(shares, logits.device, gather=self.gather), strict=True
        ):
            if not any(sizes):
                idle += [p for p in share.criterion.parameters() if p.requires_grad]
                continue
            for name, value in terms_of(share, sizes).items():
                found[f"{share.kind}/{name}"] = weights[share.kind].to(value.dtype) * value
        # Sums over nothing: 0 with a gradient of 0, which DDP waits for.
        nothing = [part.flatten()[:0].sum() for part in ([] if found else [logits]) + idle]
        if nothing:
            zero = torch.stack(nothing).sum()
            zero = zero.to(torch.promote_types(zero.dtype, torch.float32))
            found["task"] = found["task"] + zero if "task" in found else zero
        return found

    def extra_repr(self) -> str:
        return f"weights={self.weights}, gather={self.gather}"

    def _shares(
        self,
        student: Features,
        target: Tensor | None,
        **given: tuple[Input | None, Tensor | None],
    ) -> list[Share]:
        found = [
            share_of(kind, getattr(self, kind), student, target, *arguments)
            for kind, arguments in given.items()
        ]
        return [share for share in found if share is not None]
