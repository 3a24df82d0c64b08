"""What the memory of contrastive distillation promises beyond the shared contract."""

from __future__ import annotations

import copy
import importlib
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel

from structkd import Features
from structkd.criteria import contrastive
from structkd.criteria.contrastive import ContrastiveRepresentationLoss, counted
from tests.cases.case import shaped
from tests.largest import Largest
from tests.reference import contrastive as reference

SIZE = 20


def _make(**options) -> ContrastiveRepresentationLoss:
    torch.manual_seed(0)
    return ContrastiveRepresentationLoss(SIZE, **{"embedding_dim": 4, "negatives": 9, **options})


def _shaped(dtype: torch.dtype = torch.float32, **options) -> ContrastiveRepresentationLoss:
    return shaped(_make(**options).to(dtype), *_batch(0, dtype=dtype))


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


def test_resumed_run_equals_the_unbroken_one(tmp_path) -> None:
    unbroken = _make()
    start = unbroken.draws.clone()
    optimizer = _sgd(unbroken)
    _train(unbroken, optimizer, range(3))
    path = tmp_path / "run.pt"
    torch.save({"criterion": unbroken.state_dict(), "sgd": optimizer.state_dict()}, path)
    wanted = _train(unbroken, optimizer, range(3, 7))

    resumed = _make()
    again = _sgd(resumed)  # before the heads have a shape
    saved = torch.load(path, weights_only=True)
    resumed.load_state_dict(saved["criterion"])
    again.load_state_dict(saved["sgd"])
    torch.manual_seed(12345)  # torch's own state has no part in it
    assert _train(resumed, again, range(3, 7)) == wanted
    for name, value in unbroken.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert (unbroken.draws - start).tolist() == [0, 7]  # the counter alone moves the draws


def test_a_checkpoint_holds_tensors_alone_of_sizes_that_never_change(tmp_path) -> None:
    criterion = _shaped()
    before = {name: value.shape for name, value in criterion.state_dict().items()}
    criterion(*_batch(0))
    after = criterion.state_dict()
    assert before == {name: value.shape for name, value in after.items()}
    save_file(after, tmp_path / "criterion.safetensors")  # as Accelerate does
    resumed = _make()
    resumed.load_state_dict(load_file(tmp_path / "criterion.safetensors"))
    assert torch.equal(resumed.sample_negatives(5), criterion.sample_negatives(5))
    assert torch.equal(resumed(*_batch(1)), criterion(*_batch(1)))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_go_on_by_themselves(how) -> None:
    original = _make()
    original(*_batch(0))
    twin = how(original)
    assert torch.equal(twin.sample_negatives(6), original.sample_negatives(6))
    wanted = twin(*_batch(1))
    assert torch.equal(original(*_batch(1)), wanted)


def test_compiles_into_one_graph_and_once() -> None:
    torch._dynamo.reset()
    wanted, criterion = _shaped(), _shaped()
    compiled = torch.compile(criterion, backend="aot_eager", fullgraph=True)
    for step in range(2):
        torch.testing.assert_close(compiled(*_batch(step)), wanted(*_batch(step)))
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in range(2, 5):
            torch.testing.assert_close(compiled(*_batch(step)), wanted(*_batch(step)))
    torch.testing.assert_close(criterion.bank_s, wanted.bank_s)
    assert torch.equal(criterion.draws, wanted.draws)


def test_banks_begin_as_the_published_codes() -> None:
    large = ContrastiveRepresentationLoss(500, embedding_dim=64)
    for bank in (large.bank_s, large.bank_t):
        assert bank.square().sum(dim=1).mean() == pytest.approx(1, abs=0.03)
        assert bank.abs().max() <= (3 / 64) ** 0.5


def test_draws_follow_the_seed_and_the_step_alone() -> None:
    one, same, other = _make(seed=3), _make(seed=3), _make(seed=4)
    torch.manual_seed(12345)
    assert torch.equal(one.sample_negatives(6), same.sample_negatives(6))
    assert torch.equal(one.sample_negatives(6), one.sample_negatives(6))
    assert not torch.equal(one.sample_negatives(6), other.sample_negatives(6))
    assert torch.equal(one.bank_s, same.bank_s)
    assert not torch.equal(one.bank_s, other.bank_s)
    assert not torch.equal(one.bank_s, one.bank_t)
    before = one.sample_negatives(6)
    one(*_batch(0))
    assert not torch.equal(one.sample_negatives(6), before)


def _too_far(drawn: torch.Tensor, size: int) -> float:
    """How many standard deviations chi-square lies above its mean, for uniform draws."""
    expected = drawn.numel() / size
    square = (torch.bincount(drawn.flatten(), minlength=size) - expected).square().sum() / expected
    return float((square - (size - 1)) / math.sqrt(2 * (size - 1)))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**62), step=st.integers(0, 2**62))
def test_draws_are_those_of_splitmix(seed: int, step: int) -> None:
    """To the bit, so that a run can be resumed on another device or by a later version."""
    start = reference.splitmix(step + reference.splitmix(seed))
    wanted = [reference.splitmix(start + place) % 2**63 for place in range(6)]
    assert counted(torch.tensor(seed), torch.tensor(step), (2, 3)).flatten().tolist() == wanted


def test_splitmix_gives_the_published_numbers() -> None:
    wanted = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [reference.splitmix(place) for place in range(3)] == wanted


# Some seeds, some steps, and a data set that no power of two divides.
@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**40), step=st.integers(0, 10**7), size=st.sampled_from([16, 1001]))
def test_draws_are_uniform_and_independent(seed: int, step: int, size: int) -> None:
    def draw(seed: int, step: int) -> torch.Tensor:
        return counted(torch.tensor(seed), torch.tensor(step), (4, 10_000)) % size

    here, later, other = draw(seed, step), draw(seed, step + 1), draw(seed + 1, step)
    assert here.min() >= 0
    assert _too_far(here, size) < 6
    # One after another, in the next step and under the next seed: equal by chance alone.
    chance = 1 / size
    for left, right in ((here[:, 1:], here[:, :-1]), (here, later), (here, other), (later, other)):
        deviation = math.sqrt(chance * (1 - chance) / left.numel())
        assert abs(float((left == right).double().mean()) - chance) < 6 * deviation


def test_negatives_are_uniform_over_the_data_set() -> None:
    criterion = _shaped(negatives=2000)
    drawn = []
    for step in range(5):
        drawn.append(criterion.sample_negatives(4))
        criterion(*_batch(step))
    assert _too_far(torch.stack(drawn), SIZE) < 6
    assert len(torch.stack(drawn).flatten(1).unique(dim=0)) == 5


def test_an_average_of_weights_takes_the_banks_too() -> None:
    criterion = _shaped()
    average = AveragedModel(criterion, use_buffers=True)
    average.update_parameters(criterion)
    before = criterion.bank_s.clone()
    criterion(*_batch(0))  # sets the normaliser
    average.update_parameters(criterion)
    averaged = average.module.eval()
    torch.testing.assert_close(averaged.bank_s, (before + criterion.bank_s) / 2)
    # It counts from the first batch that has one, whatever share of the average that is.
    for name in ("bank_s", "bank_t", "draws"):
        getattr(averaged, name).copy_(getattr(criterion, name))
    torch.testing.assert_close(averaged(*_batch(1)), criterion.eval()(*_batch(1)))


def test_only_the_rows_of_the_batch_move_and_as_published() -> None:
    criterion = _shaped(torch.float64, momentum=0.3)
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
    criterion = _shaped(torch.float64)
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
    criterion = _shaped(torch.float64)
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


def test_rows_of_the_negatives_are_never_gathered() -> None:
    criterion = _shaped(embedding_dim=32, negatives=400)
    with Largest() as largest:
        criterion(*_batch(0)).backward()
    assert largest.numel <= 6 * 401 < 6 * 401 * 32


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


def test_bad_index_is_named() -> None:
    criterion = _make()
    student, teacher = _batch(0)
    with pytest.raises(ValueError, match=r"needs index.*feats\.replace\(index=index\)"):
        criterion(student.replace(index=None), teacher)
    with pytest.raises(ValueError, match="needs index"):
        criterion(student.embedding, teacher.embedding)
    for outside in (-1, SIZE):
        index = student.index.clone()
        index[2] = outside
        with pytest.raises(ValueError, match=r"index must lie in 0\.\.19 \(dataset_size is 20\)"):
            criterion(student.replace(index=index), teacher)
    with pytest.raises(ValueError, match=r"index must have shape \(6,\), got \(5,\)"):
        criterion(student.replace(index=student.index[:5]), teacher)
    with pytest.raises(TypeError, match=r"index must be an int64 tensor.* float32 \(6,\)"):
        criterion(student.replace(index=student.index.float()), teacher)
    assert not criterion.normalized.any()
    assert torch.equal(criterion.sample_negatives(6), _make().sample_negatives(6))


def test_a_position_that_comes_twice_keeps_a_unit_row() -> None:
    criterion = _shaped()
    student, teacher = _batch(0)
    index = torch.tensor([4, 4, 1, 2, 3, 4])
    unit = torch.nn.functional.normalize(criterion.head_s(student.embedding), dim=1)
    wanted = torch.nn.functional.normalize(0.5 * criterion.bank_s[4] + 0.5 * unit[5], dim=0)
    criterion(student.replace(index=index), teacher)
    torch.testing.assert_close(criterion.bank_s[4], wanted)


def test_wrong_width_is_named() -> None:
    student, _ = _batch(0)
    with pytest.raises(ValueError, match=r"its shape from \(B, 5\), got float32 \(6, 3\)"):
        _shaped()(student, student)


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
        ContrastiveRepresentationLoss(**{"dataset_size": SIZE, **options})


@pytest.mark.peer
def test_equals_torchdistill() -> None:
    mid_level = importlib.import_module("torchdistill.losses.mid_level")
    criterion = _shaped(torch.float64)
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
