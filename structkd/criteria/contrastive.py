"""Contrastive distillation against a memory of the whole training set."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from structkd._checks import describe, in_range, number, whole
from structkd.criteria.base import Criterion, either
from structkd.criteria.numerics import unit
from structkd.distributed import Shards
from structkd.features import Features
from structkd.projectors import Projector, project

# Scores of a slice of the batch with the whole bank: 2^26 of them are 256 MiB in float32.
SCORES_AT_ONCE = 2**26


class ContrastiveRepresentationLoss(Criterion):
    r"""Noise-contrastive estimation between each network's embedding and a memory of the other's.

    With unit rows :math:`v = h(x) / \|h(x)\|` of linear heads h, a bank of N unit rows m for each
    network, the sample's own row as positive i = 0 and K negatives drawn uniformly from the bank,

    .. math::
        L_s = \frac{1}{B} \sum_b \left[ -\log P(v^s_b, m^t_0)
            - \sum_{i=1}^{K} \log (1 - P(v^s_b, m^t_i)) \right], \qquad
        P(v, m) = \frac{e^{v \cdot m / \tau} / Z}{e^{v \cdot m / \tau} / Z + K / N}

    and L_t with the networks' parts exchanged. Terms: ``CRD-student`` (L_s) and ``CRD-teacher``
    (L_t, which trains the teacher's head). Z is the mean of :math:`N e^{v \cdot m / \tau}` over
    the first training batch, one for each direction, and constant from then on, as in the
    published code; its 1e-7 in the denominators is left out, logarithms need none.

    After the loss, a training call moves the batch's rows: m <- mu m + (1 - mu) v, made unit.
    A call in eval mode or under ``no_grad`` changes nothing and can be repeated. Because the banks
    move before ``backward()`` runs, the gradient is taken in the forward pass; a second derivative
    is an error.

    Banks, Z, the seed and the number of draws are in ``state_dict()``: a resumed run draws the same
    negatives and gives the same values as an unbroken one on the same batches. Draws come from a
    counter, so they are independent of torch's global seed and the same on every device. A negative
    may be the sample itself, with chance 1/N, as in the published memory; the published CIFAR-100
    script draws from other
    classes instead, which needs the labels of the whole set.

    Memory: the banks take 2 N 128 4 bytes, 51 MB for 50,000 images and 1.3 GB for 1.3 million (and
    as much in a checkpoint). Scores are one product of the batch with the bank, then a gather; B K
    128 gathered rows are never built. B N scores would be 333 MB at B = 64 and N = 1.3 million, so
    the batch goes in slices of at most 2^26 scores, 268 MB, freed at once. What else lives are a
    few B (K + 1) tables, 8.4 MB each for the indices at B = 64.

    ``index`` is the sample's position in the data set, in ``Features.index``: the student's is
    read, and the teacher's where the student's has none. Both banks go by it. Where nothing is
    paired, and a student's sample is matched with another row of the teacher's set, ``index`` is
    the student's position, and the teacher's bank holds there the last teacher's row that was
    matched with it. If a position comes twice in a batch, the last one counts. A sample whose
    embedding is not finite leaves the banks as they are.

    With several processes a training call is a collective one: all of them must make it. All ranks
    move all rows of the whole batch, so that their banks stay equal without a broadcast; Z is that
    of the whole first batch; and a rank takes its own rows of the negatives that are drawn for the
    whole batch. They must be made with one seed.

    Args:
        dataset_size: N, the number of training samples.
        embedding_dim: Width of the common space.
        negatives: K >= 1.
        temperature: tau > 0.
        momentum: mu in [0, 1].
        seed: Seeds the banks and the sampler.
        gather: Return the value of the whole batch of all processes, with the gradient of the
            single-process run also where ranks hold different numbers of samples.

    Shape:
        embeddings ``(B, D_s)`` and ``(B, D_t)``, any float dtype; index ``(B,)`` int64 in
        ``[0, N)``; output a scalar in float32 (float64 for float64 inputs).

    Raises:
        ValueError: If the index is missing, of another length or device, or outside the bank
            (checked on the CPU; on other devices by their own assertion), a width is not that of
            the first call, or an argument is out of range.
        TypeError: If the index holds no whole numbers.

    References:
        Tian, Krishnan & Isola, *Contrastive Representation Distillation*, 2020, Eq. 18.

    Example:
        >>> criterion = ContrastiveRepresentationLoss(dataset_size=1000, negatives=64)
        >>> feats_s = Features(embedding=torch.randn(8, 16), index=torch.arange(8))
        >>> list(criterion.terms(feats_s, Features(embedding=torch.randn(8, 32))))
        ['CRD-student', 'CRD-teacher']
    """

    reads = ("embedding",)
    over_ranks = "always"
    bank_s: Tensor
    bank_t: Tensor
    log_normalizer: Tensor
    normalized: Tensor
    draws: Tensor

    def __init__(
        self,
        dataset_size: int,
        *,
        embedding_dim: int = 128,
        negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        seed: int = 0,
        gather: bool = False,
    ) -> None:
        super().__init__(gather=gather)
        self.embedding_dim = whole("embedding_dim", embedding_dim)
        self.dataset_size = whole("dataset_size", dataset_size)
        self.negatives = whole("negatives", negatives)
        self.temperature = number("temperature", temperature, above=0)
        self.momentum = number("momentum", momentum, at_least=0, at_most=1)
        self.seed = whole("seed", seed, at_least=0)
        self.head_s = Projector(self.embedding_dim, layers=1)
        self.head_t = Projector(self.embedding_dim, layers=1)
        random = torch.Generator().manual_seed(self.seed)
        for name in ("bank_s", "bank_t"):
            # Rows of unit length on average, as the published code starts.
            bound = math.sqrt(3 / self.embedding_dim)
            rows = torch.empty(self.dataset_size, self.embedding_dim)
            self.register_buffer(name, rows.uniform_(-bound, bound, generator=random))
        self.register_buffer("log_normalizer", torch.zeros(2))
        # Numbers, not bools: torch's average of weights subtracts its buffers.
        self.register_buffer("normalized", torch.zeros(2))
        self.register_buffer("draws", torch.tensor([self.seed, 0]))  # the seed, and how many

    def sample_negatives(self, batch: int) -> Tensor:
        """Returns the negatives of the next call, ``(batch, K)`` int64; it moves nothing.

        Args:
            batch: The samples of that call, of all processes together where it trains.
        """
        seed, done = self.draws.unbind()
        drawn = counted(seed, done, (batch, self.negatives))
        return drawn % self.dataset_size

    def compute(
        self, student: Features, teacher: Features, target: Tensor | None, shards: Shards
    ) -> dict[str, Tensor]:
        embedding_s, embedding_t = either(student, teacher, "embedding")
        index = self._index(student, teacher, embedding_s)
        unit_s, unit_t = (
            unit(project(head, rows, self.embedding_dim))
            for head, rows in ((self.head_s, embedding_s), (self.head_t, embedding_t))
        )
        learns = self.training and torch.is_grad_enabled()
        counts = shards if self.gather else Shards.alone(len(index))
        with torch.no_grad():
            drawn = self.sample_negatives(shards.total)
            drawn = drawn[shards.before : shards.before + shards.own]
            rows = torch.cat([index[:, None], drawn], dim=1)
            sides = ((unit_s, self.bank_t), (unit_t, self.bank_s))
            scores = [
                _gathered_products(values.detach(), bank, rows) / self.temperature
                for values, bank in sides
            ]
            log_normalizer = self._log_normalizer(scores, shards, learns)
            found = [
                self._contrast(table, bank, rows, log_z, counts.total)
                for table, (_, bank), log_z in zip(scores, sides, log_normalizer, strict=True)
            ]
            if learns:
                self._remember(index, unit_s, unit_t, shards)
                self.draws[1] += 1
        values = torch.stack(
            [
                _known_gradient(values, *value_and_gradient)
                for (values, _), value_and_gradient in zip(sides, found, strict=True)
            ]
        )
        loss_s, loss_t = counts.sum(values).unbind()
        return {"CRD-student": loss_s, "CRD-teacher": loss_t}

    def _index(self, student: Features, teacher: Features, embedding: Tensor) -> Tensor:
        index = teacher.index if student.index is None else student.index
        if index is None:
            raise ValueError(
                "ContrastiveRepresentationLoss needs index, every sample's position in the data "
                "set (B,): let the data set return it, and pass distiller(..., index=index) or "
                "feats.replace(index=index)"
            )
        if index.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"index must be an int64 tensor of positions, got {describe(index)}")
        if index.shape != embedding.shape[:1]:
            raise ValueError(
                f"index must have shape ({embedding.shape[0]},), got {tuple(index.shape)}"
            )
        if index.device != embedding.device:
            raise ValueError(
                f"index is on {index.device}, the embeddings on {embedding.device}: "
                f"move it with index.to('{embedding.device}')"
            )
        in_range(index, "index", self.dataset_size, "dataset_size")
        return index.long()

    def _contrast(
        self, scores: Tensor, bank: Tensor, rows: Tensor, log_normalizer: Tensor, rows_counted: int
    ) -> tuple[Tensor, Tensor]:
        """Returns the loss of scores ``(B, K + 1)``, and its gradient in their unit rows."""
        # P = sigmoid(margin)
        log_noise = math.log(self.negatives / self.dataset_size)
        margin = scores - log_normalizer - log_noise
        positive, negative = margin[:, 0], margin[:, 1:]
        value = (F.softplus(-positive).sum() + F.softplus(negative).sum()) / rows_counted
        slope = torch.sigmoid(margin)
        slope[:, 0] -= 1
        slope /= rows_counted * self.temperature
        # The sum over i of slope_i bank[rows_i], without the gathered rows.
        return value, F.embedding_bag(rows, bank, per_sample_weights=slope, mode="sum")

    def _log_normalizer(self, scores: list[Tensor], shards: Shards, learns: bool) -> Tensor:
        """Returns log Z ``(2,)``: what is set, or this batch's, which a training call sets."""
        summed = torch.stack([torch.logsumexp(table.flatten(), dim=0) for table in scores])
        if len(shards.sizes) > 1:
            each = Shards((1,) * len(shards.sizes), shards.rank)
            summed = torch.logsumexp(each.gather(summed[None]), dim=0)
        count = shards.total * scores[0].shape[1]
        estimate = summed + math.log(self.dataset_size / count)
        known = self.normalized > 0
        # Both are averaged alike, so that this is the normaliser in an average of weights, too.
        kept = self.log_normalizer / torch.where(known, self.normalized, 1)
        chosen = torch.where(known, kept, estimate)
        if learns:
            # A batch of NaN must not become the normaliser of the whole run.
            sets = known | estimate.isfinite()
            self.log_normalizer.copy_(torch.where(sets, chosen, 0))
            self.normalized.copy_(sets)
        return chosen

    def _remember(self, index: Tensor, unit_s: Tensor, unit_t: Tensor, shards: Shards) -> None:
        """Moves the rows of the whole batch in both banks, on every rank alike."""
        index, unit_s, unit_t = (shards.gather(value) for value in (index, unit_s, unit_t))
        # Writes to one row race on a GPU, so all of them write what the last one says.
        ordered, order = index.sort(stable=True)
        last = order[torch.searchsorted(ordered, index, right=True) - 1]
        for bank, values in ((self.bank_s, unit_s), (self.bank_t, unit_t)):
            old = bank[index]
            moved = unit(self.momentum * old + (1 - self.momentum) * values[last])
            usable = moved.isfinite().all(dim=1, keepdim=True)
            bank.index_copy_(0, index, torch.where(usable, moved, old).to(bank.dtype))


def counted(seed: Tensor, draws: Tensor, shape: tuple[int, int]) -> Tensor:
    """Returns random whole numbers >= 0 that a seed, a draw and a place determine.

    The mixing function of SplitMix64 (Steele, Lea & Flood, 2014) of a counter, in tensors alone: it
    has no state of its own, is the same on every device and can be part of a compiled graph.
    """
    place = torch.arange(shape[0] * shape[1], device=draws.device)
    mixed = _mix(_mix(draws + _mix(seed)) + place)
    return (mixed & (2**63 - 1)).view(shape)


def _mix(value: Tensor) -> Tensor:
    # Products wrap around; a shift has to bring zeros in, which that of signed numbers does not.
    value = value * -7046029254386353131 + -7046029254386353131
    value = (value ^ ((value >> 30) & (2**34 - 1))) * -4658895280553007687
    value = (value ^ ((value >> 27) & (2**37 - 1))) * -7723592293110705685
    return value ^ ((value >> 31) & (2**33 - 1))


def _gathered_products(unit: Tensor, bank: Tensor, rows: Tensor) -> Tensor:
    """Returns ``<unit_b, bank[rows_bk]>`` as ``(B, K + 1)``."""
    step = max(1, SCORES_AT_ONCE // bank.shape[0])
    slices = [slice(first, first + step) for first in range(0, max(len(unit), 1), step)]
    return torch.cat([(unit[part] @ bank.T).gather(1, rows[part]) for part in slices])


class _KnownGradient(torch.autograd.Function):
    """A scalar whose gradient was found with it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        # once_differentiable would let this pass: the saved gradient does not look differentiable.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "ContrastiveRepresentationLoss has no second derivative, its banks have moved on: "
                "call backward() without create_graph=True"
            )
        (gradient,) = ctx.saved_tensors
        return grad * gradient, None, None


def _known_gradient(rows: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    result: Tensor = _KnownGradient.apply(rows, value, gradient)
    return result
