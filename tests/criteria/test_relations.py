"""What RKD, DistilVPR and CC do beyond the shared contract."""

from __future__ import annotations

import importlib
import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from structkd import Criterion, Features
from structkd.criteria import relations as ours
from structkd.criteria.relations import (
    CorrelationCongruenceLoss,
    DistilVPRLoss,
    RelationalLoss,
)
from tests.cases.case import generator, normal, pick, shaped
from tests.reference import relations

both = pytest.mark.parametrize("kind", [RelationalLoss, DistilVPRLoss])


class _Memory(TorchDispatchMode):
    """Records the largest output of any operation and the most bytes that lived at once."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.now = self.peak = 0
        self.living: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.largest = max(self.largest, leaf.numel())
                self._follow(leaf.untyped_storage())
        return out

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key = storage.data_ptr()
        if key and key not in self.living:
            self.living[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self.living.pop(key, 0)


def _measure(criterion: Criterion, batch: int, width: int) -> _Memory:
    student = torch.randn(batch, width, requires_grad=True)
    teacher = torch.randn(batch, width)
    with _Memory() as memory:
        criterion(student, teacher).backward()
    return memory


@both
def test_memory_grows_with_the_square_of_the_batch(kind) -> None:
    small, large = _measure(kind(), 96, 8), _measure(kind(), 256, 8)
    # The budget of a chunk, under which nothing need be cut.
    assert small.largest <= 2**20
    assert large.largest <= 2**20 < 256**3 / 15
    # All of it, forward and backward, is a fraction of one tensor over all triples.
    assert large.peak < 256**3 * 4 / 2


def test_chunks_beyond_the_budget_grow_with_the_square(monkeypatch) -> None:
    monkeypatch.setattr(ours, "_BUDGET", 1)
    for batch in (48, 96):
        memory = _measure(RelationalLoss(), batch, 16)
        assert memory.largest <= 8 * batch**2
        assert memory.peak < 4 * 8 * 8 * batch**2


def test_chunks_change_nothing(monkeypatch) -> None:
    results = []
    for budget in (2**20, 1):
        monkeypatch.setattr(ours, "_BUDGET", budget)
        torch.manual_seed(0)
        student = torch.randn(21, 3, dtype=torch.float64, requires_grad=True)
        teacher = torch.randn(21, 5, dtype=torch.float64)
        value = RelationalLoss()(student, teacher)
        results.append((value.detach(), torch.autograd.grad(value, student)[0]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-14)


def test_weights_of_zero_leave_a_term_out() -> None:
    rows = torch.randn(4, 3), torch.randn(4, 5)
    assert list(RelationalLoss(angle_weight=0).terms(*rows)) == ["RKD-distance"]
    assert list(DistilVPRLoss(0, 1, 0).terms(*rows)) == ["VPR-angle"]
    doubled = RelationalLoss(50, 100).terms(*rows)
    for name, value in RelationalLoss().terms(*rows).items():
        torch.testing.assert_close(doubled[name], 2 * value)


@both
def test_samples_that_coincide_have_finite_gradients(kind) -> None:
    criterion, student = kind(), torch.randn(6, 4)
    student[3] = student[1]
    student[5] = 0
    student.requires_grad_()
    value = criterion(student, torch.randn(6, 4))
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()
    assert student.grad.abs().max() > 0
    for collapsed in (torch.zeros(5, 4), torch.ones(5, 4)):
        collapsed.requires_grad_()
        value = criterion(collapsed, torch.randn(5, 4))
        value.backward()
        assert value.isfinite()
        assert (collapsed.grad == 0).all()


@both
@pytest.mark.parametrize("side", [0, 1])
def test_one_nan_passes_through(kind, side: int) -> None:
    rows = [torch.randn(5, 3), torch.randn(5, 3)]
    rows[side][2, 1] = math.nan
    assert all(term.isnan() for term in kind().terms(*rows).values())


def test_coinciding_samples_count_as_in_the_definition() -> None:
    student = torch.randn(5, 3, dtype=torch.float64)
    student[4] = student[0]
    student.requires_grad_()
    teacher = torch.randn(5, 2, dtype=torch.float64)
    terms = RelationalLoss(1, 1).terms(student, teacher)
    for name, oracle in (
        ("RKD-distance", relations.distance_gap),
        ("RKD-angle", relations.angle_gap),
    ):
        wanted = oracle(student, teacher)
        torch.testing.assert_close(terms[name], wanted)
        grad, definition = (torch.autograd.grad(v, student)[0] for v in (terms[name], wanted))
        torch.testing.assert_close(grad, definition)


def test_near_samples_far_from_the_origin_keep_their_distance() -> None:
    rows = torch.randn(6, 8, dtype=torch.float64) + 1000
    rows[1] = rows[0] + 1e-3
    rows, others = rows.float(), torch.randn(6, 4)
    wanted = ours._distance_gap(rows.double(), others.double())
    torch.testing.assert_close(ours._distance_gap(rows, others).double(), wanted, rtol=1e-5, atol=0)


def test_geodesics_equal_the_poincare_formula_and_its_limits() -> None:
    rows = torch.randn(5, 3, dtype=torch.float64)
    wanted = torch.tensor(relations.geodesics(rows, 0.3))
    torch.testing.assert_close(ours._poincare_distances(rows, 0.3), wanted)
    # From the centre, d = 2 |x|; for short rows the space is flat and all distances are doubled.
    centred = torch.cat([torch.zeros(1, 3), rows])
    torch.testing.assert_close(ours._poincare_distances(centred, 0.3)[0, 1:], 2 * rows.norm(dim=1))
    tiny = (1e-4 * rows).float()
    torch.testing.assert_close(
        ours._poincare_distances(tiny, 0.3), 2 * torch.cdist(tiny, tiny), rtol=1e-4, atol=0
    )


def test_geodesics_beyond_the_rim_are_exact() -> None:
    """tanh(30) is 1 in float64: there the ball's own formula gives infinity."""
    rows = torch.tensor([[30.0, 0.0], [0.0, 30.0], [-50.0, 0.0], [55.0, 0.0]]).requires_grad_()
    table = ours._poincare_distances(rows, 1.0)
    # On a line through the centre lengths add up; across a right angle sinh^2 is halved twice.
    torch.testing.assert_close(table[0, 2], torch.tensor(160.0))
    torch.testing.assert_close(table[0, 3], torch.tensor(50.0))
    torch.testing.assert_close(table[0, 1], torch.tensor(120.0 - math.log(2)))
    table.sum().backward()
    assert rows.grad.isfinite().all()


def test_angle_gap_without_a_gradient_is_the_same() -> None:
    student, teacher = torch.randn(6, 3), torch.randn(6, 4)
    with torch.no_grad():
        value = ours._angle_gap(student, teacher)
    torch.testing.assert_close(value, ours._angle_gap(student.requires_grad_(), teacher).detach())


@pytest.mark.parametrize(
    "make", [RelationalLoss, lambda: DistilVPRLoss(1, 2, 0)], ids=["rkd", "vpr"]
)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16), log_scale=st.floats(-4, 4))
def test_only_the_shape_of_the_embeddings_counts(make, seed: int, log_scale: float) -> None:
    """Neither side's scale, rotation or place changes a distance's share or an angle."""
    rng = generator(seed)
    batch, width = pick(rng, 3, 8), pick(rng, 1, 5)
    sides = [normal(rng, batch, width) for _ in range(2)]
    wanted = make()(*sides)
    for side in range(2):
        turn = torch.linalg.qr(normal(rng, width, width))[0]
        moved = list(sides)
        moved[side] = 10**log_scale * (sides[side] @ turn + normal(rng, width))
        torch.testing.assert_close(make()(*moved), wanted)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_geodesics_depend_on_the_scale_and_not_on_the_rotation(seed: int) -> None:
    rng = generator(seed)
    rows, turn = normal(rng, 6, 4), torch.linalg.qr(normal(rng, 4, 4))[0]
    geodesics = DistilVPRLoss(0, 0, 1)
    assert geodesics(rows @ turn, rows) < 1e-20
    assert geodesics(3 * rows, rows) > 1e-6


def test_congruence_learns_and_is_saved() -> None:
    torch.manual_seed(0)
    student = Features(embedding=torch.randn(16, 4))
    teacher = Features(embedding=torch.randn(16, 6))
    criterion = shaped(CorrelationCongruenceLoss(), student, teacher)
    before = {name: value.clone() for name, value in criterion.state_dict().items()}
    assert set(before) == {name for name, _ in criterion.named_parameters()}
    optimizer = torch.optim.SGD(criterion.parameters(), lr=1.0)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = criterion(student, teacher)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    after = criterion.state_dict()
    assert all(not torch.equal(after[name], value) for name, value in before.items())


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="distance_weight and angle_weight are both 0"):
        RelationalLoss(0, 0)
    with pytest.raises(ValueError, match="angle_weight must be finite >= 0, got -1"):
        RelationalLoss(angle_weight=-1)
    with pytest.raises(ValueError, match="are all 0"):
        DistilVPRLoss(0, 0, 0)
    with pytest.raises(ValueError, match="curvature must be finite > 0, got 0"):
        DistilVPRLoss(curvature=0)
    with pytest.raises(ValueError, match="gamma must be finite > 0"):
        CorrelationCongruenceLoss(gamma=0)
    with pytest.raises(ValueError, match="embedding_dim must be at least 1"):
        CorrelationCongruenceLoss(embedding_dim=0)
    congruence, rows = CorrelationCongruenceLoss(), torch.randn(5, 4)
    congruence(torch.randn(5, 3), rows)
    with pytest.raises(ValueError, match=r"its shape from \(B, 3\), got float32 \(5, 7\)"):
        congruence(torch.randn(5, 7), rows)
    with pytest.raises(ValueError, match="needs a batch of at least 3, got 2"):
        RelationalLoss()(torch.randn(2, 3), torch.randn(2, 3))


@pytest.mark.peer
def test_congruence_equals_torchdistill() -> None:
    """The kernels agree on unit rows; the losses do not, and ours is the paper's.

    Peng et al. take the squared Frobenius norm over B^2, of kernels between unit rows. torchdistill
    1.1 leaves the norm unsquared and the rows as they come; the expansion of the Gaussian kernel
    holds for unit rows only.
    """
    peer = importlib.import_module("torchdistill.losses.mid_level")
    kernel = {"type": "gaussian", "gamma": 0.4, "max_p": 2}
    theirs = peer.CCKDLoss("linear", "linear", kernel, "none")
    student, teacher = torch.randn(8, 4), torch.randn(8, 6)
    criterion = CorrelationCongruenceLoss()
    value = criterion(student, teacher)
    unit_s = torch.nn.functional.normalize(criterion.student_embedding(student), dim=1)
    unit_t = torch.nn.functional.normalize(criterion.teacher_embedding(teacher), dim=1)
    norm = theirs({"linear": {"output": unit_s}}, {"linear": {"output": unit_t}})
    torch.testing.assert_close(value, norm.square() / 8**2)


@pytest.mark.peer
def test_relations_equal_torchdistill() -> None:
    """The same means over all pairs and triples."""
    peer = importlib.import_module("torchdistill.losses.mid_level")
    theirs = peer.RKDLoss("x", "x", 25.0, 50.0, "mean")
    student, teacher = torch.randn(8, 4), torch.randn(8, 6)
    value = theirs({"x": {"output": student}}, {"x": {"output": teacher}})
    torch.testing.assert_close(RelationalLoss()(student, teacher), value)
