"""Contrastive distillation against a memory of the whole training set."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from structkd._checks import describe, in_range, number, whole
from structkd.criteria.base import Criterion, either
from structkd.features import Features
from structkd.projectors import Projector

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

    Banks, Z and the sampler's state are in ``state_dict()``: a resumed run draws the same
    negatives and gives the same values as an unbroken one on the same batches. Draws are
    independent of torch's global seed and, like all of torch's, differ between CPU and GPU. A
    negative may be the sample itself, with chance 1/N, as in the published memory; the published
    CIFAR-100 script draws from other classes instead, which needs the labels of the whole set.

    Memory: the banks take 2 N 128 4 bytes, 51 MB for 50,000 images and 1.3 GB for 1.3 million (and
    as much in a checkpoint). Scores are one product of the batch with the bank, then a gather; B K
    128 gathered rows are never built. B N scores would be 333 MB at B = 64 and N = 1.3 million, so
    the batch goes in slices of at most 2^26 scores, 268 MB, freed at once. What else lives are a
    few B (K + 1) tables, 8.4 MB each for the indices at B = 64.

    ``index`` is the sample's position in the data set, in ``Features.index`` of the student (or of
    the teacher, where the student's has none). A position that comes twice in a batch keeps one of
    its updates, the last one on a CPU. A sample whose embedding is not finite leaves the banks as
    they are. Every process keeps banks of its own and moves only the rows that it sees.

    Args:
        student_dim: Width of the student's embedding.
        teacher_dim: Width of the teacher's.
        dataset_size: N, the number of training samples.
        embedding_dim: Width of the common space.
        negatives: K >= 1.
        temperature: tau > 0.
        momentum: mu in [0, 1].
        seed: Seeds the banks and the sampler.

    Shape:
        embeddings ``(B, D_s)`` and ``(B, D_t)``, any float dtype; index ``(B,)`` int64 in
        ``[0, N)``; output a scalar in float32 (float64 for float64 inputs).

    Raises:
        ValueError: If the index is missing, of another length or device, or outside the bank (on a
            CPU; elsewhere the device's own assertion speaks), a width is not the one that the
            criterion was built for, or an argument is out of range.
        TypeError: If the index holds no whole numbers.

    References:
        Tian, Krishnan & Isola, *Contrastive Representation Distillation*, 2020, Eq. 18.

    Example:
        >>> criterion = ContrastiveRepresentationLoss(16, 32, 1000, negatives=64)
        >>> feats_s = Features(embedding=torch.randn(8, 16), index=torch.arange(8))
        >>> list(criterion.terms(feats_s, Features(embedding=torch.randn(8, 32))))
        ['CRD-student', 'CRD-teacher']
    """

    reads = ("embedding",)
    bank_s: Tensor
    bank_t: Tensor
    log_normalizer: Tensor
    normalized: Tensor

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        dataset_size: int,
        *,
        embedding_dim: int = 128,
        negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        seed: int = 0,
    ) -> None:
        super().__init__()
        width = whole("embedding_dim", embedding_dim)
        self.dataset_size = whole("dataset_size", dataset_size)
        self.negatives = whole("negatives", negatives)
        self.temperature = number("temperature", temperature, above=0)
        self.momentum = number("momentum", momentum, at_least=0, at_most=1)
        self.seed = whole("seed", seed, at_least=0)
        self.draws = 0
        self.head_s = Projector(student_dim, width, layers=1)
        self.head_t = Projector(teacher_dim, width, layers=1)
        random = torch.Generator().manual_seed(self.seed)
        for name in ("bank_s", "bank_t"):
            # Rows of unit length on average, as the published code starts.
            bound = math.sqrt(3 / width)
            rows = torch.empty(self.dataset_size, width)
            self.register_buffer(name, rows.uniform_(-bound, bound, generator=random))
        self.register_buffer("log_normalizer", torch.zeros(2))
        self.register_buffer("normalized", torch.zeros(2, dtype=torch.bool))

    @classmethod
    def from_features(
        cls, feats_s: Features, feats_t: Features, dataset_size: int, **options: Any
    ) -> ContrastiveRepresentationLoss:
        """Builds the criterion for the widths of two example forward passes, on their device.

        Args:
            feats_s: Any batch of the student's features.
            feats_t: Any batch of the teacher's.
            dataset_size: The number of training samples.
            **options: Any keyword of the constructor.

        Raises:
            ValueError: If an embedding is missing.
        """
        embedding_s, embedding_t = either(feats_s, feats_t, "embedding")
        criterion = cls(embedding_s.shape[1], embedding_t.shape[1], dataset_size, **options)
        return criterion.to(embedding_s.device)

    def sample_negatives(self, batch: int) -> Tensor:
        """Returns the negatives of the next call, ``(batch, K)`` int64; it moves nothing."""
        device = self.bank_s.device
        random = torch.Generator(device=device).manual_seed(_mixed(self.seed, self.draws))
        shape = (batch, self.negatives)
        return torch.randint(self.dataset_size, shape, generator=random, device=device)

    def compute(
        self, student: Features, teacher: Features, target: Tensor | None
    ) -> dict[str, Tensor]:
        embedding_s, embedding_t = either(student, teacher, "embedding")
        index = self._index(student, teacher, embedding_s)
        unit_s = F.normalize(self.head_s(embedding_s), dim=1)
        unit_t = F.normalize(self.head_t(embedding_t), dim=1)
        learns = self.training and torch.is_grad_enabled()
        with torch.no_grad():
            rows = torch.cat([index[:, None], self.sample_negatives(len(index))], dim=1)
            found_s, grad_s = self._contrast(unit_s.detach(), self.bank_t, rows, 0, learns)
            found_t, grad_t = self._contrast(unit_t.detach(), self.bank_s, rows, 1, learns)
            if learns:
                self._remember(self.bank_s, index, unit_s)
                self._remember(self.bank_t, index, unit_t)
                self.draws += 1
        return {
            "CRD-student": _known_gradient(unit_s, found_s, grad_s),
            "CRD-teacher": _known_gradient(unit_t, found_t, grad_t),
        }

    def get_extra_state(self) -> Tensor:
        """The sampler's state. On the host, where the generator is seeded without a sync."""
        return torch.tensor([self.seed, self.draws])

    def set_extra_state(self, state: Tensor) -> None:
        self.seed, self.draws = (int(value) for value in state)

    def extra_repr(self) -> str:
        return (
            f"dataset_size={self.dataset_size}, negatives={self.negatives}, "
            f"temperature={self.temperature}, momentum={self.momentum}, seed={self.seed}"
        )

    def _index(self, student: Features, teacher: Features, embedding: Tensor) -> Tensor:
        index = teacher.index if student.index is None else student.index
        if index is None:
            raise ValueError(
                "ContrastiveRepresentationLoss needs student.index, every sample's position in "
                "the data set (B,): let the data set return it and pass feats.replace(index=index)"
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
        self, unit: Tensor, bank: Tensor, rows: Tensor, direction: int, learns: bool
    ) -> tuple[Tensor, Tensor]:
        """Returns the loss of unit rows ``(B, d)`` against ``bank[rows]``, and its gradient."""
        scores = _gathered_products(unit, bank, rows) / self.temperature
        log_normalizer = self._log_normalizer(scores, direction, learns)
        # P = sigmoid(margin)
        log_noise = math.log(self.negatives / self.dataset_size)
        margin = scores - log_normalizer - log_noise
        positive, negative = margin[:, 0], margin[:, 1:]
        batch = unit.shape[0]
        value = (F.softplus(-positive).sum() + F.softplus(negative).sum()) / batch
        slope = torch.sigmoid(margin)
        slope[:, 0] -= 1
        slope /= batch * self.temperature
        # The sum over i of slope_i bank[rows_i], without the gathered rows.
        return value, F.embedding_bag(rows, bank, per_sample_weights=slope, mode="sum")

    def _log_normalizer(self, scores: Tensor, direction: int, learns: bool) -> Tensor:
        """Returns log Z: the one that is set, or this batch's, which a training call sets."""
        mean = torch.logsumexp(scores.flatten(), dim=0) - math.log(scores.numel())
        estimate = mean + math.log(self.dataset_size)
        is_set = self.normalized[direction]
        chosen = torch.where(is_set, self.log_normalizer[direction], estimate)
        if learns:
            # A batch of NaN must not become the normaliser of the whole run.
            sets = is_set | estimate.isfinite()
            self.log_normalizer[direction] = torch.where(sets, chosen, 0)
            self.normalized[direction] = sets
        return chosen

    def _remember(self, bank: Tensor, index: Tensor, unit: Tensor) -> None:
        old = bank[index]
        moved = F.normalize(self.momentum * old + (1 - self.momentum) * unit, dim=1)
        usable = moved.isfinite().all(dim=1, keepdim=True)
        bank.index_copy_(0, index, torch.where(usable, moved, old).to(bank.dtype))


def _mixed(seed: int, draws: int) -> int:
    """Returns one seed of a run's seed and a step, far apart for neighbouring ones."""
    # Odd multipliers are one-to-one modulo 2^64; the shift brings high bits down.
    state = (seed * 0x9E3779B97F4A7C15 + draws * 0xD1342543DE82EF95) % 2**64
    return (state ^ (state >> 32)) % 2**63


def _gathered_products(unit: Tensor, bank: Tensor, rows: Tensor) -> Tensor:
    """Returns ``<unit_b, bank[rows_bk]>`` as ``(B, K + 1)``."""
    step = max(1, SCORES_AT_ONCE // bank.shape[0])
    slices = [slice(first, first + step) for first in range(0, unit.shape[0], step)]
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
