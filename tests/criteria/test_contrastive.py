"""What the memory of contrastive distillation promises beyond the shared contract."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from structkd import Features
from structkd.criteria import contrastive
from structkd.criteria.contrastive import ContrastiveRepresentationLoss
from tests.reference import contrastive as reference

SIZE = 20


def _make(*, shaped: bool = True, **options) -> ContrastiveRepresentationLoss:
    torch.manual_seed(0)
    options = {"embedding_dim": 4, "negatives": 9, **options}
    criterion = ContrastiveRepresentationLoss(**{"dataset_size": SIZE, **options})
    if shaped:
        with torch.no_grad():
            criterion.eval()(*_batch(0))
    return criterion.train()


def _batch(step: int, size: int = 6, dtype: torch.dtype = torch.float32):
    rng = torch.Generator().manual_seed(step)
    index = torch.randperm(SIZE, generator=rng)[:size]
    student = torch.randn(size, 3, generator=rng, dtype=dtype)
    teacher = torch.randn(size, 5, generator=rng, dtype=dtype)
    return Features(embedding=student, index=index), Features(embedding=teacher)


def _train(criterion: ContrastiveRepresentationLoss, optimizer, steps: range) -> list[float]:
    values = []
    for step in steps:
        optimizer.zero_grad()
        value = criterion(*_batch(step))
        value.backward()
        optimizer.step()
        values.append(float(value.detach()))
    return values


def _sgd(criterion: ContrastiveRepresentationLoss) -> torch.optim.Optimizer:
    return torch.optim.SGD(criterion.parameters(), lr=0.05, momentum=0.9)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_go_on_by_themselves(how) -> None:
    original = _make()
    original(*_batch(0))
    twin = how(original)
    assert torch.equal(twin.sample_negatives(6), original.sample_negatives(6))
    wanted = twin(*_batch(1))
    assert torch.equal(original(*_batch(1)), wanted)


def test_sampler_follows_its_seed_and_its_step() -> None:
    one, same, other = _make(seed=3), _make(seed=3), _make(seed=4)
    assert torch.equal(one.sample_negatives(6), same.sample_negatives(6))
    assert torch.equal(one.sample_negatives(6), one.sample_negatives(6))
    assert not torch.equal(one.sample_negatives(6), other.sample_negatives(6))
    assert torch.equal(one.bank_s, same.bank_s)
    assert not torch.equal(one.bank_s, other.bank_s)
    assert not torch.equal(one.bank_s, one.bank_t)
    before = one.sample_negatives(6)
    one(*_batch(0))
    assert not torch.equal(one.sample_negatives(6), before)


def test_negatives_are_uniform_over_the_data_set() -> None:
    criterion = _make(negatives=2000)
    counts, pairs, last = torch.zeros(SIZE), torch.zeros(SIZE**2), None
    for step in range(5):
        drawn = criterion.sample_negatives(4).flatten()
        counts += torch.bincount(drawn, minlength=SIZE)
        # Neighbours in one draw, and the same place in the next one, tell nothing of each other.
        pairs += torch.bincount(SIZE * drawn + drawn.roll(1), minlength=SIZE**2)
        if last is not None:
            pairs += torch.bincount(SIZE * drawn + last, minlength=SIZE**2)
        last = drawn
        criterion(*_batch(step))
    # 40,000 draws on 20 rows: 2,000 each, with a standard deviation of 44.
    assert (counts - 2000).abs().max() < 5 * 44
    # 72,000 pairs of 400 kinds: 180 each, with a standard deviation of 13.4.
    assert (pairs - 180).abs().max() < 5 * 13.4


@given(seed=st.integers(0, 2**40), sizes=st.tuples(st.integers(0, 9), st.integers(0, 9)))
@settings(max_examples=15, deadline=None)
def test_a_place_in_the_batch_draws_the_same_however_long_the_batch_is(seed, sizes) -> None:
    criterion = ContrastiveRepresentationLoss(1000, embedding_dim=2, negatives=7, seed=seed)
    short, long = (criterion.sample_negatives(size) for size in sorted(sizes))
    assert torch.equal(long[: len(short)], short)
    assert ((long >= 0) & (long < 1000)).all()


def test_only_the_rows_of_the_batch_move_and_as_published() -> None:
    criterion = _make(momentum=0.3).double()
    student, teacher = _batch(1, dtype=torch.float64)
    index = student.index.tolist()
    rows_s = reference.unit_rows(criterion.head_s, student.embedding)
    rows_t = reference.unit_rows(criterion.head_t, teacher.embedding)
    wanted_s = reference.moved(criterion.bank_s, index, rows_s, 0.3)
    wanted_t = reference.moved(criterion.bank_t, index, rows_t, 0.3)
    before = criterion.bank_s.clone()
    criterion(student, teacher)
    torch.testing.assert_close(criterion.bank_s, wanted_s)
    torch.testing.assert_close(criterion.bank_t, wanted_t)
    others = [i for i in range(SIZE) if i not in index]
    assert torch.equal(criterion.bank_s[others], before[others])
    torch.testing.assert_close(criterion.bank_s[index].norm(dim=1), torch.ones(6).double())


def test_backward_uses_the_banks_from_before_their_update() -> None:
    criterion = _make().double()
    student, teacher = _batch(1, dtype=torch.float64)
    embedding = student.embedding.clone().requires_grad_()
    wanted = reference.crd(criterion, embedding, teacher.embedding, student.index)
    expected = torch.autograd.grad(
        sum(wanted.values()), [embedding, *criterion.parameters()], retain_graph=True
    )
    value = criterion(student.replace(embedding=embedding), teacher)
    got = torch.autograd.grad(value, [embedding, *criterion.parameters()])
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


def test_normaliser_is_the_first_batch_s_and_stays() -> None:
    criterion = _make().double()
    student, teacher = _batch(1, dtype=torch.float64)
    negatives = criterion.sample_negatives(6).tolist()
    rows = [[i, *n] for i, n in zip(student.index.tolist(), negatives, strict=True)]
    anchors = reference.unit_rows(criterion.head_s, student.embedding)
    table = reference.powers(anchors, criterion.bank_t.clone(), rows, 0.07)
    wanted = math.log(reference.normalizer(table, SIZE))
    assert not criterion.normalized.any()
    criterion(student, teacher)
    assert criterion.normalized.all()
    assert float(criterion.log_normalizer[0]) == pytest.approx(wanted)
    first = criterion.log_normalizer.clone()
    criterion(*_batch(2, dtype=torch.float64))
    assert torch.equal(criterion.log_normalizer, first)


def test_compiles_in_one_graph_and_moves_as_it_does_eagerly() -> None:
    torch._dynamo.reset()
    wanted, criterion = _make(), _make()
    compiled = torch.compile(criterion, backend="aot_eager", fullgraph=True)
    for step in range(3):
        torch.testing.assert_close(compiled(*_batch(step)), wanted(*_batch(step)))
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(compiled(*_batch(3)), wanted(*_batch(3)))
    torch.testing.assert_close(criterion.state_dict(), wanted.state_dict())


@pytest.mark.parametrize("how", ["eval", "no_grad"])
def test_a_call_that_does_not_train_moves_nothing(how: str) -> None:
    criterion = _make()
    criterion(*_batch(0))
    before = copy.deepcopy(criterion.state_dict())
    criterion.train(how != "eval")
    with torch.set_grad_enabled(how != "no_grad"):
        one, two = criterion(*_batch(1)), criterion(*_batch(1))
    assert torch.equal(one, two)
    after = criterion.state_dict()
    assert all(torch.equal(before[name], value) for name, value in after.items())


def test_a_batch_that_is_not_finite_does_not_spoil_the_memory() -> None:
    criterion = _make()
    student, teacher = _batch(0)
    student.embedding[0] = float("inf")
    assert criterion(student, teacher).isnan()
    assert criterion.bank_s.isfinite().all()
    assert not criterion.normalized[0]
    assert criterion.normalized[1]
    assert criterion(*_batch(1)).isfinite()
    assert criterion.normalized.all()


def test_slices_of_the_batch_give_the_same(monkeypatch) -> None:
    whole = _make()
    wanted = whole(*_batch(0))
    monkeypatch.setattr(contrastive, "SCORES_AT_ONCE", 2 * SIZE + 1)
    sliced = _make()
    torch.testing.assert_close(sliced(*_batch(0)), wanted)
    torch.testing.assert_close(sliced.bank_s, whole.bank_s)


def test_embeddings_learn_under_an_optimizer_and_are_saved() -> None:
    criterion = _make()
    before = copy.deepcopy(criterion.state_dict())
    _train(criterion, _sgd(criterion), range(1))
    after = criterion.state_dict()
    names = [name for name, _ in criterion.named_parameters()]
    assert len(names) == 4
    assert {*names, "bank_s", "bank_t", "log_normalizer", "draws"} <= set(after)
    for name in [*names, "bank_s", "bank_t", "log_normalizer", "draws"]:
        assert not torch.equal(after[name], before[name]), name


def test_loss_falls_when_both_networks_agree() -> None:
    # Student and teacher see one signal through different matrices: there is something to find.
    rng = torch.Generator().manual_seed(0)
    signal = torch.randn(SIZE, 3, generator=rng)
    mixing = torch.randn(3, 5, generator=rng)
    criterion = _make(temperature=0.2)
    optimizer = torch.optim.Adam(criterion.parameters(), lr=0.02)
    index = torch.arange(SIZE)
    values = []
    for _ in range(60):
        optimizer.zero_grad()
        value = criterion(
            Features(embedding=signal, index=index), Features(embedding=signal @ mixing)
        )
        value.backward()
        optimizer.step()
        values.append(float(value.detach()))
    assert sum(values[-5:]) < 0.8 * sum(values[:5])


def test_second_derivative_is_an_error() -> None:
    student, teacher = _batch(0)
    embedding = student.embedding.requires_grad_()
    value = _make()(student, teacher)
    with pytest.raises(RuntimeError, match=r"no second derivative.*without create_graph=True"):
        torch.autograd.grad(value, embedding, create_graph=True)


def test_index_may_come_with_either_network() -> None:
    student, teacher = _batch(0)
    wanted = _make()(student, teacher)
    bare = student.replace(index=None)
    assert torch.equal(_make()(bare, teacher.replace(index=student.index)), wanted)


def test_a_position_that_comes_twice_keeps_a_unit_row() -> None:
    criterion = _make()
    student, teacher = _batch(0)
    index = torch.tensor([4, 4, 1, 2, 3, 4])
    unit = torch.nn.functional.normalize(criterion.head_s(student.embedding), dim=1)
    wanted = torch.nn.functional.normalize(0.5 * criterion.bank_s[4] + 0.5 * unit[5], dim=0)
    criterion(student.replace(index=index), teacher)
    torch.testing.assert_close(criterion.bank_s[4], wanted)


def test_wrong_width_is_named() -> None:
    student, _ = _batch(0)
    with pytest.raises(ValueError, match=r"from \(B, 5\), got float32 \(6, 3\): make a new one"):
        _make()(student, student)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dataset_size": 0}, "dataset_size must be at least 1, got 0"),
        ({"embedding_dim": 0}, "embedding_dim must be at least 1"),
        ({"negatives": 0}, "negatives must be at least 1"),
        ({"temperature": 0}, "temperature must be finite > 0"),
        ({"momentum": 1.5}, "momentum must be finite >= 0 and <= 1, got 1.5"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
)
def test_bad_arguments_are_named(options, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        _make(**options)


@pytest.mark.peer
def test_equals_torchdistill() -> None:
    mid_level = pytest.importorskip("torchdistill.losses.mid_level")
    criterion = _make().double()
    peer = mid_level.CRDLoss("s", "e", "t", 4, SIZE, 9, SIZE, eps=0.0).double()
    peer.memory_v1.copy_(criterion.bank_s)
    peer.memory_v2.copy_(criterion.bank_t)
    for step in range(3):
        student, teacher = _batch(step, dtype=torch.float64)
        picked = torch.cat([student.index[:, None], criterion.sample_negatives(6)], dim=1)
        unit = torch.nn.functional.normalize
        theirs = peer(
            {
                "s": {"output": unit(criterion.head_s(student.embedding), dim=1)},
                "e": {"input": {"pos_idx": student.index, "contrast_idx": picked}},
            },
            {"t": {"output": unit(criterion.head_t(teacher.embedding), dim=1)}},
        )
        # It leaves a vector of one element; its own sampler (contrast_idx=None) fails on a
        # missing attribute, so ours draws for both.
        torch.testing.assert_close(criterion(student, teacher), theirs.squeeze())
    torch.testing.assert_close(peer.memory_v1, criterion.bank_s)
    torch.testing.assert_close(peer.memory_v2, criterion.bank_t)
