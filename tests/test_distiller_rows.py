"""Rows that have a pair are told to the Distiller, for any criterion and on any rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import structkd
from structkd import Distiller
from tests.processes import start
from tests.test_distiller_ddp import NAMES, OPTIONS, Net, worlds

BATCH, CLASSES = 10, 4
# Rank 0 has the rows before the first cut, and so on. Of the whole batch these have a pair: 4 or
# none, as one criterion keeps the size that it met first.
CUTS = {1: [0, BATCH], 2: [0, 6, BATCH], 4: [0, 4, 5, 6, BATCH]}
STEPS = [[0, 1, 4, 8], [6, 7, 8, 9], [], [3, 5, 6, 8]]
LAYERS = {"intermediate": ["first", "second"], "embedding": "fc:input"}


def _make(name: str, rank: int = 0) -> Distiller:
    torch.manual_seed(0)
    student, teacher = Net(5).double(), Net(6).double()
    images = torch.randn(2, 4, 3, 4, 4, dtype=torch.float64)
    options = dict(OPTIONS.get(name, {}))
    if "batch_size" in options:
        options["batch_size"] = 4
    spec = [
        {"type": name, "gather": True, **options},
        {"type": "SupervisionLoss", "gather": True, "weight": 0.2},
    ]
    whole = Distiller(student, teacher, spec, example=tuple(images), layers=LAYERS)
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


def _train(name: str, rank: int, world: int, device: str = "cpu") -> dict[str, Tensor]:
    whole = _make(name, rank).to(device)
    module: nn.Module = DistributedDataParallel(whole) if world > 1 else whole
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.05, momentum=0.9)
    poor, rich, target = (values.to(device) for values in _data())
    low, high = CUTS[world][rank], CUTS[world][rank + 1]
    found: dict[str, Tensor] = {}
    for step, pairs in enumerate(STEPS):
        mine = [row for row in pairs if low <= row < high]
        paired = torch.tensor([row - low for row in mine], dtype=torch.int64)
        if step % 2:
            paired = torch.zeros(high - low).index_fill(0, paired, 1) > 0
        output, terms = module(
            poor[step, low:high],
            target[step, low:high],
            x_teacher=rich[step, mine],
            paired=paired,
            index=torch.arange(low, high, device=device),
        )
        task = F.cross_entropy(output, target[step, low:high], reduction="sum") * world / BATCH
        optimizer.zero_grad()
        (task + 0.3 * sum(terms.values())).backward()
        optimizer.step()
        found |= {f"{step}.{term}": value.detach() for term, value in terms.items()}
    state = {key: value for key, value in whole.state_dict().items() if torch.is_tensor(value)}
    return found | state


def _worker(rank: int, world: int, device: str, out: str) -> None:
    torch.save({name: _train(name, rank, world, device) for name in NAMES}, f"{out}.{rank}")


@pytest.fixture(scope="module", params=worlds(4))
def ranks(request, tmp_path_factory) -> list[dict[str, dict[str, Tensor]]]:
    world, device = request.param
    folder: Path = tmp_path_factory.mktemp("rows")
    start(_worker, folder, world, world, device, str(folder / "state"), device=device)
    saved = [folder / f"state.{r}" for r in range(world)]
    return [torch.load(file, weights_only=True, map_location="cpu") for file in saved]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_unequal_rows_and_none_equal_the_single_process(ranks, name: str) -> None:
    wanted = _train(name, 0, 1)
    assert "2.no pairs" in wanted
    for results in ranks:
        assert results[name].keys() == wanted.keys()
        for key, value in wanted.items():
            torch.testing.assert_close(
                results[name][key], value, rtol=1e-10, atol=1e-10, msg=lambda m, k=key: f"{k}: {m}"
            )


class LogitGap(structkd.Criterion):
    """A criterion of a user's own, which knows of no rows."""

    reads = ("logits",)

    def compute(self, student, teacher, target) -> dict[str, Tensor]:
        return {"gap": (student.logits - teacher.logits).abs().mean()}


def _distiller(criterion: object) -> tuple[Distiller, Tensor, Tensor]:
    torch.manual_seed(0)
    poor, rich = torch.randn(2, 6, 3, 4, 4)
    return Distiller(Net(5), Net(6), criterion, layers=LAYERS), poor, rich


@pytest.mark.parametrize("spec", [LogitGap(), LogitGap() + 0.5 * structkd.CORALLoss(), "DSLoss"])
def test_any_criterion_sees_the_rows_that_have_a_pair_alone(spec) -> None:
    whole, poor, rich = _distiller(spec)
    whole.eval()
    rows = torch.tensor([4, 1, 3])
    output, terms = whole(poor, x_teacher=rich[rows], paired=rows)
    assert output.shape == (6, CLASSES)
    _, wanted = whole(poor[rows], x_teacher=rich[rows])
    torch.testing.assert_close(terms, wanted)
    mask = torch.zeros(6, dtype=torch.bool).index_fill(0, rows, True)
    _, by_mask = whole(poor, x_teacher=rich[mask], paired=mask)
    torch.testing.assert_close(by_mask, wanted)


def test_labels_and_positions_go_with_the_rows() -> None:
    whole, poor, rich = _distiller(structkd.DKDLoss())
    target, rows = torch.tensor([0, 1, 2, 3, -100, 1]), torch.tensor([5, 4, 0])
    _, terms = whole(poor, target, x_teacher=rich[rows], paired=rows)
    _, wanted = whole(poor[rows], target[rows], x_teacher=rich[rows])
    torch.testing.assert_close(terms, wanted)
    whole, poor, rich = _distiller(
        structkd.ContrastiveRepresentationLoss(dataset_size=20, negatives=4)
    )
    _, terms = whole(poor, x_teacher=rich[:2], paired=rows[:2], index=torch.arange(10, 16))
    assert list(terms) == ["CRD-student", "CRD-teacher"]


@pytest.mark.parametrize("given", ["none", "zero samples"])
def test_a_batch_without_a_pair_is_the_lone_students_step(given: str) -> None:
    whole, poor, rich = _distiller(structkd.KDLoss() + structkd.DenseStructureLoss())
    nobody = torch.zeros(6, dtype=torch.bool)
    x_teacher = None if given == "none" else rich[:0]
    output, terms = whole(poor, x_teacher=x_teacher, paired=nobody)
    assert list(terms) == ["no pairs"]
    (output.square().mean() + sum(terms.values())).backward()
    wanted = torch.autograd.grad(
        whole.student(poor).square().mean(), list(whole.student.parameters())
    )
    for parameter, grad in zip(whole.student.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=0, atol=0)


def test_a_teacher_that_is_read_has_to_be_said() -> None:
    whole, poor, rich = _distiller("KDLoss")
    with pytest.raises(TypeError, match=r"x_teacher is missing.*x_teacher=x"):
        whole(poor)
    with pytest.raises(TypeError):
        whole(poor, None, rich)
    labels = Distiller(Net(5), Net(6), structkd.SupervisionLoss())
    assert list(labels(poor, torch.zeros(6, dtype=torch.int64))[1]) == ["SRM"]


@pytest.mark.parametrize(
    ("x_teacher", "paired", "error", "message"),
    [
        (2, torch.tensor([0, 1, 2]), ValueError, r"x_teacher must hold one sample for each of the"),
        (0, torch.tensor([0, 9]), ValueError, "paired must lie in 0..5"),
        (3, torch.ones(4, dtype=torch.bool), ValueError, r"paired must be a bool mask \(6,\)"),
        (3, torch.ones(3), TypeError, "paired must be"),
        (3, [0, 1, 2], TypeError, "paired must be"),
        (None, torch.tensor([0, 1]), ValueError, r"paired names 2 row.*x_teacher is None"),
        (1, torch.tensor([3]), ValueError, r"1 row\(s\) with a pair, but CORALLoss.*at least 2"),
    ],
)
def test_bad_input_is_named(x_teacher, paired, error, message) -> None:
    whole, poor, rich = _distiller("CORALLoss")
    given = None if x_teacher is None else rich[:x_teacher]
    with pytest.raises(error, match=message):
        whole(poor, x_teacher=given, paired=paired)


@pytest.mark.parametrize("given", ["target", "index"])
@pytest.mark.parametrize("length", [2, 7])
def test_labels_and_positions_are_those_of_the_whole_batch(given: str, length: int) -> None:
    whole, poor, rich = _distiller("KDLoss")
    few = {given: torch.zeros(length, dtype=torch.int64)}
    said = f"{given} must have an entry .* 6 rows of x.*got {length}"
    with pytest.raises(ValueError, match=said):
        whole(poor, x_teacher=rich[:2], paired=torch.tensor([1, 0]), **few)


def _mixed_worker(rank: int, out: str) -> None:
    said = []
    for spec, images in (
        ([structkd.CORALLoss(), structkd.DKDLoss(gather=True)], slice(0, 2)),
        ([structkd.KDLoss(), structkd.CORALLoss(gather=True)], None if rank else slice(0, 2)),
    ):
        whole, poor, rich = _distiller(spec)
        try:
            whole(
                poor,
                torch.zeros(6, dtype=torch.int64),
                x_teacher=None if images is None else rich[images],
                paired=torch.arange(0 if images is None else 2),
            )
        except ValueError as error:
            said.append(str(error))
    torch.save(said, f"{out}.{rank}")


def test_ranks_that_cannot_be_exact_are_told(tmp_path: Path) -> None:
    start(_mixed_worker, tmp_path, 2, str(tmp_path / "said"))
    for rank in range(2):
        mixed, without = torch.load(f"{tmp_path / 'said'}.{rank}", weights_only=True)
        assert "CORALLoss compares samples and was made without gather=True" in mixed
        assert "rank(s) [1] have no x_teacher while others have" in without
        assert "x_teacher=images[:0]" in without
