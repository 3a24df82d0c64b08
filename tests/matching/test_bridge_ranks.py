"""A mixed batch under several processes, each with its own number of every kind, is one batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import structkd
from structkd import BridgeLoss, Distiller, Features
from structkd.distributed import average_gradients
from tests.processes import start
from tests.test_distiller_ddp import NAMES, OPTIONS, Net

BATCH, CLASSES, WORLD = 10, 4, 2
PAIRS = [name for name in NAMES if name not in ("BridgeLoss", "SupervisionLoss")]
# Rank 0 has the rows before this one. Of the whole batch these have a pair (4 or none, as one
# criterion is built for a size), a match, a label.
CUT = 6
CASES = {
    "uneven": ([0, 1, 4, 8], [2, 6, 7, 9], [0, 3, 7]),
    "one has no pair": ([6, 7, 8, 9], [0, 9, 2], [0, 1, 8, 9]),
    "one has no match and no label": ([3, 5, 6, 8], [1, 2, 4], [0, 5]),
    "nobody has a pair": ([], [6, 9], [8]),
    "nobody has anything": ([], [], []),
}
STEPS = list(CASES.values())


def _make(name: str, rank: int = 0) -> Distiller:
    torch.manual_seed(0)
    student, teacher = Net(5).double(), Net(6).double()
    images = torch.randn(2, 4, 3, 4, 4, dtype=torch.float64)
    options = dict(OPTIONS.get(name, {}))
    if "batch_size" in options:
        options["batch_size"] = 4
    spec = {
        "type": "BridgeLoss",
        "pair": [{"type": name, "weight": 0.5, **options}],
        "match": [{"type": "KDLoss"}, {"type": "CORALLoss", "weight": 3.0}],
        "pair_weight": 0.3,
        "gather": True,
    }
    layers = {"intermediate": ["first", "second"], "embedding": "fc:input"}
    whole = Distiller(student, teacher, spec, example=tuple(images), layers=layers)
    if rank:  # what a rank starts from must not matter under DDP
        with torch.no_grad():
            for parameter in whole.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * rank)
    return whole


def _data() -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    poor, rich = torch.randn(2, len(STEPS), BATCH, 3, 4, 4, generator=rng, dtype=torch.float64)
    return poor, rich, torch.randint(0, CLASSES, (len(STEPS), BATCH), generator=rng)


def _own(rows: list[int], rank: int, world: int) -> tuple[list[int], Tensor]:
    """The rows of a kind that a rank holds, in the whole batch and in its own."""
    low, high = (0, BATCH) if world == 1 else ((0, CUT), (CUT, BATCH))[rank]
    mine = [row for row in rows if low <= row < high]
    return mine, torch.tensor([row - low for row in mine], dtype=torch.int64)


def _train(name: str, rank: int, world: int) -> dict[str, Tensor]:
    whole = _make(name, rank if world > 1 else 0)
    module: nn.Module = DistributedDataParallel(whole) if world > 1 else whole
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.05, momentum=0.9)
    poor, rich, target = _data()
    bounds = slice(0, BATCH) if world == 1 else (slice(0, CUT), slice(CUT, BATCH))[rank]
    found: dict[str, Tensor] = {}
    for step, (pairs, matches, labelled) in enumerate(STEPS):
        (pairs, paired), (matches, matched) = (_own(r, rank, world) for r in (pairs, matches))
        _, known = _own(labelled, rank, world)
        if step % 2:
            known = torch.zeros(bounds.stop - bounds.start).index_fill(0, known, 1) > 0
        _, terms = module(
            poor[step, bounds],
            target[step, bounds],
            rich[step, pairs],
            x_matched=rich[step, matches],
            index=torch.arange(BATCH)[bounds],
            labelled=known,
            paired=paired,
            matched=matched,
        )
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        found |= {f"{step}.{term}": value.detach() for term, value in terms.items()}
    state = {key: value for key, value in whole.state_dict().items() if torch.is_tensor(value)}
    return found | state


def _worker(rank: int, out: str) -> None:
    torch.save({name: _train(name, rank, WORLD) for name in PAIRS}, f"{out}.{rank}")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, dict[str, Tensor]]]:
    folder: Path = tmp_path_factory.mktemp("bridge")
    start(_worker, folder, WORLD, str(folder / "state"))
    return [torch.load(f"{folder / 'state'}.{r}", weights_only=True) for r in range(WORLD)]


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
def test_terms_and_training_equal_the_single_process(ranks, name: str) -> None:
    wanted = _train(name, 0, 1)
    assert any(".pair/" in key for key in wanted)
    for results in ranks:
        assert results[name].keys() == wanted.keys()
        for key, value in wanted.items():
            torch.testing.assert_close(
                results[name][key], value, rtol=1e-10, atol=1e-10, msg=lambda m, k=key: f"{k}: {m}"
            )


def _memory(rank: int, world: int) -> dict[str, Tensor]:
    """A criterion that trains by all ranks without being asked to gather; rank 1 has no pair."""
    torch.manual_seed(0)
    memory = structkd.ContrastiveRepresentationLoss(5, 7, BATCH, negatives=4)
    loss = BridgeLoss(memory).double()
    rng = torch.Generator().manual_seed(3)
    embedding, teacher = (torch.randn(BATCH, w, generator=rng, dtype=torch.float64) for w in (5, 7))
    low, high = (0, BATCH) if world == 1 else ((0, CUT), (CUT, BATCH))[rank]
    pairs, paired = _own([1, 3], rank, world)
    student = Features(
        logits=embedding[low:high, :CLASSES],
        embedding=embedding[low:high],
        index=torch.arange(low, high),
    )
    target = torch.arange(low, high) % CLASSES
    value = loss(student, Features(embedding=teacher[pairs]), target, paired=paired)
    value.backward()
    average_gradients(loss)
    trained = {name: p.grad for name, p in loss.named_parameters()}
    return {"loss": value.detach(), "bank": memory.bank_s, **trained}


def _memory_worker(rank: int, out: str) -> None:
    torch.save(_memory(rank, WORLD), f"{out}.{rank}")


def test_a_criterion_that_trains_by_all_ranks_waits_for_none_without_a_row(tmp_path) -> None:
    out = tmp_path / "out"
    start(_memory_worker, tmp_path, WORLD, str(out))
    wanted = _memory(0, 1)
    for rank in range(WORLD):
        found = torch.load(f"{out}.{rank}", weights_only=True)
        for key, value in wanted.items():
            torch.testing.assert_close(found[key], value, rtol=1e-10, atol=1e-12)


def _loop_worker(rank: int, out: str) -> None:
    torch.save([_by_hand(rank, WORLD), _refused(rank)], f"{out}.{rank}")


def _by_hand(rank: int, world: int) -> dict[str, Tensor]:
    """Logits as parameters, without DDP: what a loop of one's own has."""
    rng = torch.Generator().manual_seed(2)
    logits, teacher = torch.randn(2, BATCH, CLASSES, generator=rng, dtype=torch.float64)
    target = torch.arange(BATCH) % CLASSES
    loss = BridgeLoss(
        structkd.CurriculumTemperatureLoss() + structkd.KDLoss(), gather=True
    ).double()
    shift = nn.Parameter(torch.zeros(CLASSES, dtype=torch.float64))
    low, high = (0, BATCH) if world == 1 else ((0, CUT), (CUT, BATCH))[rank]
    pairs, paired = _own([7, 9], rank, world)
    student = Features(logits=logits[low:high] + shift)
    value = loss(student, Features(logits=teacher[pairs]), target[low:high], paired=paired)
    value.backward()
    trained = nn.ParameterList([shift, *loss.parameters()])
    average_gradients(trained)
    return {"loss": value.detach(), **{str(i): p.grad for i, p in enumerate(trained)}}


def _refused(rank: int) -> str:
    """What both ranks say where one of them leaves the teacher's features out."""
    loss = BridgeLoss(structkd.KDLoss(), gather=True)
    feats, target = Features(logits=torch.ones(3, CLASSES)), torch.zeros(3, dtype=torch.int64)
    try:
        loss(feats, None if rank else feats, target)
    except ValueError as error:
        return str(error)
    return "nothing"


def test_a_loop_without_ddp_and_a_rank_without_features(tmp_path) -> None:
    out = tmp_path / "out"
    start(_loop_worker, tmp_path, WORLD, str(out))
    wanted = _by_hand(0, 1)
    for rank in range(WORLD):
        found, said = torch.load(f"{out}.{rank}", weights_only=True)
        for key, value in wanted.items():
            torch.testing.assert_close(found[key], value, rtol=1e-10, atol=1e-12)
        assert "rank(s) [1] have no teacher while others" in said
        assert "feats.rows(none)" in said
        assert "to a Distiller zero samples, images[:0]" in said


def test_a_member_that_gathers_makes_all_of_them_gather() -> None:
    loss = BridgeLoss(structkd.DSLoss(structkd.CrossCorrelationLoss(), gamma=1.0, gather=True))
    assert loss.gather
    assert all(m.gather for m in loss.modules() if isinstance(m, structkd.Criterion))
    assert not BridgeLoss(structkd.KDLoss()).gather
