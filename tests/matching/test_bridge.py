"""The mixed batch: its loss is the sum of its parts, each on its own rows."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import structkd
from structkd import BridgeLoss, Distiller, FeatureCapture, Features
from tests.reference import bridge

CLASSES = 4
WEIGHTS = {"task": 0.7, "pair": 2.0, "match": 0.3}
OPTIONS = {f"{name}_weight": weight for name, weight in WEIGHTS.items()}


def _rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _loss(**options: object) -> BridgeLoss:
    return BridgeLoss(structkd.KDLoss(4.0), structkd.LogitMSELoss(), **{**OPTIONS, **options})


def _rows(batch: int, rng: torch.Generator) -> Tensor:
    """Some rows in any order, none and all too."""
    count = int(torch.randint(0, batch + 1, (), generator=rng))
    return torch.randperm(batch, generator=rng)[:count]


def _batch(seed: int, batch: int = 7) -> dict[str, Tensor]:
    rng = _rng(seed)
    normal = lambda n: 2 * torch.randn(n, CLASSES, generator=rng, dtype=torch.float64)  # noqa: E731
    found = {"student": normal(batch).requires_grad_()}
    found |= {name: _rows(batch, rng) for name in ("labelled", "paired", "matched")}
    found["teacher"], found["matches"] = normal(len(found["paired"])), normal(len(found["matched"]))
    found["target"] = torch.randint(0, CLASSES, (batch,), generator=rng)
    found["target"][torch.rand(batch, generator=rng) < 0.3] = -100
    return found


def _terms(loss: BridgeLoss, given: dict[str, Tensor]) -> dict[str, Tensor]:
    whole = lambda name: Features(logits=given[name])  # noqa: E731
    rows = {name: given[name] for name in ("labelled", "paired", "matched")}
    return loss.terms(
        whole("student"), whole("teacher"), given["target"], matches=whole("matches"), **rows
    )


def _as_mask(rows: Tensor, batch: int) -> Tensor:
    return torch.zeros(batch, dtype=torch.bool).index_fill(0, rows, True)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16), batch=st.integers(1, 7))
def test_the_loss_is_the_sum_of_its_parts_computed_apart(seed: int, batch: int) -> None:
    found, apart = _batch(seed, batch), _batch(seed, batch)
    terms = _terms(_loss(), found)
    labelled, paired, matched = (apart[n].tolist() for n in ("labelled", "paired", "matched"))
    wanted = {"task": bridge.task(apart["student"], apart["target"], labelled)}
    if paired:
        wanted["pair/KD"] = bridge.distillation(apart["student"], apart["teacher"], paired)
    if matched:
        wanted["match/Logits"] = bridge.regression(apart["student"], apart["matches"], matched)
    assert terms.keys() == wanted.keys()
    for name, value in wanted.items():
        value = WEIGHTS[name.partition("/")[0]] * value
        torch.testing.assert_close(terms[name], value, rtol=1e-11, atol=1e-13)
    (grad,) = torch.autograd.grad(sum(terms.values()), found["student"])
    total = sum(WEIGHTS[name.partition("/")[0]] * value for name, value in wanted.items())
    expected = torch.zeros_like(grad)
    if total.requires_grad:
        (expected,) = torch.autograd.grad(total, apart["student"])
    torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-13)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_the_order_of_rows_does_not_matter_and_masks_say_what_positions_say(seed: int) -> None:
    found, batch = _batch(seed), 7
    value = sum(_terms(_loss(), found).values())
    order = torch.randperm(batch, generator=_rng(seed + 1))
    place = order.argsort()  # where each row went
    moved = {**found, "student": found["student"][order], "target": found["target"][order]}
    for name, teacher in (("labelled", None), ("paired", "teacher"), ("matched", "matches")):
        moved[name] = _as_mask(place[found[name]], batch)
        if teacher is not None:  # a mask names the rows as they stand in the batch
            moved[teacher] = found[teacher][place[found[name]].argsort()]
    torch.testing.assert_close(sum(_terms(_loss(), moved).values()), value, rtol=1e-12, atol=1e-13)


def test_gradcheck() -> None:
    given = _batch(3)
    value = lambda student: sum(_terms(_loss(), {**given, "student": student}).values())  # noqa: E731
    assert torch.autograd.gradcheck(value, given["student"])


@pytest.mark.parametrize("soft", [False, True], ids=["labels", "probabilities"])
def test_a_task_of_ones_own_is_asked_about_rows_with_a_label_alone(soft: bool) -> None:
    rng = _rng(0)
    logits = torch.randn(6, CLASSES, generator=rng, dtype=torch.float64)
    target = (torch.rand(6, CLASSES, generator=rng) < 0.4).double()
    target[2] = torch.nan  # has no label: nobody may read it
    labelled = torch.tensor([0, 1, 3, 5])
    feats = Features(logits=logits)
    if soft:
        share = torch.where(target.isnan(), target, target + 0.1)
        share = share / share.sum(dim=1, keepdim=True)
        value = BridgeLoss()(feats, None, share, labelled=labelled)
        wanted = bridge.task(logits, share, labelled.tolist())
    else:
        loss = BridgeLoss(task=nn.BCEWithLogitsLoss(reduction="none"))
        value = loss(feats, None, target, labelled=_as_mask(labelled, 6))
        wanted = bridge.binary(logits, target, labelled.tolist())
    torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-14)


def test_a_task_that_takes_class_indices_never_sees_a_missing_one() -> None:
    loss = BridgeLoss(task=nn.CrossEntropyLoss(reduction="none", label_smoothing=0.1))
    logits, target = torch.randn(4, CLASSES), torch.tensor([1, -100, 0, -100])
    wanted = F.cross_entropy(logits[[0, 2]], target[[0, 2]], label_smoothing=0.1)
    torch.testing.assert_close(loss(Features(logits=logits), None, target), wanted)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_labels_of_a_narrow_type_reach_a_task_of_ones_own_as_it_wants_them(dtype) -> None:
    loss = BridgeLoss(task=nn.CrossEntropyLoss(reduction="none"))
    logits = torch.randn(3, 200)
    target = torch.tensor([156, 0, 9])  # 156 is -100 in 8 bits
    value = loss(Features(logits=logits), None, target.to(dtype))
    torch.testing.assert_close(value, F.cross_entropy(logits, target))


class Net(nn.Module):
    """With batch norm, which sees the whole batch or not."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv(x)).relu().mean((2, 3)))


def _images(seed: int, batch: int, channels: int) -> Tensor:
    return torch.randn(batch, channels, 6, 6, generator=_rng(seed))


def _trained(how: str) -> dict[str, Tensor]:
    """A few steps on own images without any pair, by the bridge or as anybody would."""
    torch.manual_seed(0)
    student, teacher = Net(1, 5), Net(3, 6)
    torch.manual_seed(1)
    example = _images(8, 2, 1), _images(9, 2, 3)
    spec = {"type": "BridgeLoss", "pair": ["FitNetLoss", "DSLoss"], "match": "CORALLoss"}
    layers = {"intermediate": "conv", "embedding": "fc:input"}
    distiller = Distiller(student, teacher, spec, example=example, layers=layers)
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    for step in range(4):
        x, target = _images(step, 8, 1), torch.arange(8) % CLASSES
        target[step] = -100
        if how == "bridge":
            none = torch.zeros(8, dtype=torch.bool)
            rich = _images(step, 0, 3) if step % 2 else None  # an empty batch, or no batch
            output, terms = distiller(x, target, rich, paired=none, matched=none)
            assert list(terms) == ["task"]
            loss = sum(terms.values())
        else:
            output = student(x)
            loss = F.cross_entropy(output, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {**student.state_dict(), "loss": loss.detach()}


def test_without_pairs_and_matches_it_is_the_lone_students_step_to_the_last_bit() -> None:
    ours, lone = _trained("bridge"), _trained("lone")
    for name, value in lone.items():
        assert torch.equal(ours[name], value), name


def test_the_criterion_without_rows_has_a_gradient_of_zero_and_not_none() -> None:
    pair = structkd.FitNetLoss(2, 3)
    loss = BridgeLoss(pair)
    feats = Features(
        logits=torch.randn(3, CLASSES, requires_grad=True), intermediate=torch.randn(3, 2, 4, 4)
    )
    with torch.no_grad():
        pair.regressor.conv.weight[0, 0] = torch.inf  # 0 times this would not be 0
    loss(feats, None, torch.tensor([0, 1, 2])).backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in loss.parameters())


def test_a_batch_without_any_label_costs_nothing_for_the_task() -> None:
    logits = torch.randn(3, CLASSES, requires_grad=True)
    feats, none = Features(logits=logits), torch.full((3,), -100)
    terms = BridgeLoss().terms(feats, None, none)
    terms["task"].backward()
    assert float(terms["task"].detach()) == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))
    for target in (torch.zeros(3, dtype=torch.int64), torch.rand(3, CLASSES)):
        hidden = BridgeLoss().terms(feats, None, target, labelled=torch.zeros(3, dtype=torch.bool))
        assert float(hidden["task"].detach()) == 0
    nothing = BridgeLoss(structkd.KDLoss(), task_weight=0).terms(feats)
    assert list(nothing) == ["task"]
    assert float(nothing["task"].detach()) == 0
    assert nothing["task"].requires_grad


def test_a_distiller_runs_the_teacher_on_the_pairs_and_the_matches_alone() -> None:
    torch.manual_seed(0)
    student, teacher = Net(1, 5), Net(3, 6)
    seen: list[int] = []
    teacher.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    example = _images(8, 2, 1), _images(9, 2, 3)
    spec = {"type": "BridgeLoss", "pair": "FitNetLoss", "match": "KDLoss", "pair_weight": 0.5}
    distiller = Distiller(student, teacher, spec, example=example, layers={"intermediate": "conv"})
    x, rich, other = _images(1, 6, 1), _images(2, 2, 3), _images(3, 3, 3)
    paired, matched = torch.tensor([5, 1]), torch.tensor([True, False, True, False, True, False])
    target = torch.arange(6) % CLASSES
    seen.clear()
    output, terms = distiller(x, target, rich, paired=paired, matched=matched, x_matched=other)
    assert sorted(seen) == [2, 3]
    assert list(terms) == ["task", "pair/FitNets", "match/KD"]
    # The same by captures of one's own, with features that a gallery might have kept.
    bridge_loss = distiller.criterion
    with torch.no_grad():
        feats_t = FeatureCapture(teacher, intermediate="conv")(rich)
        matches = FeatureCapture(teacher, intermediate="conv")(other)
    distiller.detach()
    feats_s = FeatureCapture(student.train(), intermediate="conv")(x)
    torch.testing.assert_close(feats_s.logits, output)  # one pass: batch norm saw all rows
    again = bridge_loss.terms(
        feats_s, feats_t, target, paired=paired, matches=matches, matched=matched
    )
    for name, value in terms.items():
        torch.testing.assert_close(again[name], value)


def test_a_teacher_that_nothing_reads_is_not_run_on_the_students_images() -> None:
    student, teacher = Net(1, 5), Net(3, 6)  # the teacher cannot take the student's images
    x, target = _images(1, 6, 1), torch.arange(6) % CLASSES
    matched, other = torch.tensor([0, 4]), _images(3, 2, 3)
    distiller = Distiller(student, teacher, BridgeLoss(match=structkd.KDLoss()))
    _, terms = distiller(x, target, x_matched=other, matched=matched)
    assert list(terms) == ["task", "match/KD"]
    kept = Features(logits=torch.randn(2, CLASSES))  # as a gallery gives them
    assert list(distiller(x, target, matches=kept, matched=matched)[1]) == ["task", "match/KD"]
    assert list(distiller(x, target)[1]) == ["task"]
    of_class = structkd.ClassMeanKDLoss(torch.randn(8, CLASSES), torch.arange(8) % CLASSES)
    for criterion, names in (
        (of_class, ["ClassKD"]),
        (BridgeLoss(of_class), ["task", "pair/ClassKD"]),
        (BridgeLoss(match=of_class), ["task", "match/ClassKD"]),
    ):
        assert list(Distiller(student, teacher, criterion)(x, target)[1]) == names


def test_index_goes_with_its_row() -> None:
    class Seen(structkd.Criterion):
        reads = ("logits",)

        def compute(self, student, teacher, target):
            self.given = student.index.tolist(), target.tolist()
            return {"seen": student.logits.sum()}

    criterion = Seen()
    distiller = Distiller(Net(1, 5), Net(1, 6), BridgeLoss(criterion))
    target = torch.tensor([0, -100, 2, 3])
    distiller(
        _images(0, 4, 1),
        target,
        _images(1, 2, 1),
        index=torch.tensor([40, 41, 42, 43]),
        paired=torch.tensor([3, 1]),
        labelled=torch.tensor([True, True, True, False]),
    )
    assert criterion.given == ([43, 41], [-100, -100])  # row 3 has a label, yet not for this step


def test_all_rows_have_a_pair_unless_told_otherwise() -> None:
    logits, teacher = torch.randn(2, 5, CLASSES)
    loss = BridgeLoss(structkd.KDLoss())
    feats_s, feats_t, target = (
        Features(logits=logits),
        Features(logits=teacher),
        torch.arange(5) % 4,
    )
    value = loss(feats_s, feats_t, target)
    assert torch.equal(value, loss(feats_s, feats_t, target, paired=torch.ones(5) > 0))
    torch.testing.assert_close(
        value, F.cross_entropy(logits, target) + structkd.KDLoss()(logits, teacher)
    )


def test_weights_change_from_step_to_step() -> None:
    loss, given = _loss(), _batch(1)
    before = _terms(loss, given)
    assert loss.weights == WEIGHTS
    loss.set_weight("pair", 0.0)
    after = _terms(loss, given)
    assert float(after["pair/KD"].detach()) == 0
    assert torch.equal(after["task"], before["task"])
    with pytest.raises(ValueError, match=r"BridgeLoss has no part 'pairs'; near names: pair"):
        loss.set_weight("pairs", 1.0)


def test_a_task_that_comes_in_later_needs_the_target_then() -> None:
    loss = BridgeLoss(structkd.KDLoss(), task_weight=0)
    assert list(loss.terms(FEATS, FEATS)) == ["pair/KD"]
    loss.set_weight("task", 0.5)
    with pytest.raises(ValueError, match="BridgeLoss needs target"):
        loss.terms(FEATS, FEATS)
    loss.set_weight("task", 0.0)
    assert list(loss.terms(FEATS, FEATS)) == ["pair/KD"]


class _Waits(TorchFunctionMode):
    """Lists what would make the host wait for an accelerator, were the tensors on one."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        moves = "device" in kwargs or any(isinstance(a, torch.device | str) for a in args[1:])
        if name in ("nonzero", "new_tensor", "item", "tolist") or (
            name in ("to", "tensor") and moves and "non_blocking" not in kwargs
        ):
            self.found.append(name)
        return func(*args, **kwargs)


@pytest.mark.parametrize("soft", [False, True], ids=["labels", "probabilities"])
def test_positions_make_nothing_wait_for_an_accelerator(soft: bool) -> None:
    given = _batch(2)
    loss = _loss()
    if soft:
        given["target"] = torch.rand(7, CLASSES, dtype=torch.float64).softmax(dim=1)
    with _Waits() as waits:
        _terms(loss, given)
        BridgeLoss().terms(given["student"], None, given["target"])
    assert not waits.found


def test_pickles_copies_and_counts_epochs() -> None:
    loss = BridgeLoss(structkd.CurriculumTemperatureLoss() + structkd.KDLoss())
    copied = copy.deepcopy(loss)
    copied.step_epoch()
    inner = [m for m in copied.modules() if isinstance(m, structkd.CurriculumTemperatureLoss)]
    assert int(inner[0].epoch) == 2


def test_half_precision_and_autocast() -> None:
    logits, target = torch.randn(4, CLASSES), torch.tensor([0, 1, -100, 3])
    with torch.autocast("cpu", torch.bfloat16):
        value = BridgeLoss()(Features(logits=logits.bfloat16()), None, target)
    assert value.dtype == torch.float32
    assert torch.equal(value, F.cross_entropy(logits.bfloat16().float(), target))
    nothing = BridgeLoss(task_weight=0)(Features(logits=logits.half()))
    assert nothing.dtype == torch.float32


FEATS = Features(logits=torch.randn(3, CLASSES))
TARGET = torch.tensor([0, 1, 2])
MASK = torch.tensor([True, False, True])


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (
            {"paired": MASK[:2]},
            ValueError,
            r"paired must be a bool mask \(3,\) or .*got bool \(2,\)",
        ),
        ({"paired": MASK.float()}, TypeError, "paired must be a bool mask.*got float32"),
        ({"paired": torch.tensor([0, 3])}, ValueError, r"paired must lie in 0\.\.2"),
        ({"labelled": MASK[:2]}, ValueError, "labelled must be a bool mask"),
        ({"matched": MASK.int().double()}, TypeError, "matched must be a bool mask"),
        (
            {"paired": MASK},
            ValueError,
            r"one row for each of the 2 that paired.*features.rows\(paired",
        ),
        (
            {"teacher": None, "paired": MASK},
            ValueError,
            r"paired names 2 row\(s\).*teacher is None",
        ),
        (
            {"matched": MASK},
            ValueError,
            r"matched names 2 row\(s\) that have a match.*matches is N",
        ),
        ({"target": None}, ValueError, "needs target.*task_weight=0"),
        ({"target": TARGET[:2]}, ValueError, r"target must have shape \(3,\)"),
        ({"target": torch.tensor([0, 1, 9])}, ValueError, r"target must lie in 0\.\.3"),
        (
            {"target": torch.rand(3, 2)},
            ValueError,
            r"target probabilities must have shape \(3, 4\)",
        ),
        ({"target": [0, 1, 2]}, TypeError, "target must be a tensor, got list"),
        ({"student": Features()}, ValueError, "BridgeLoss needs student.logits"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_named(change, error, said: str) -> None:
    given = {"student": FEATS, "teacher": FEATS, "target": TARGET, **change}
    with pytest.raises(error, match=said):
        _loss()(given.pop("student"), given.pop("teacher"), given.pop("target"), **given)


def test_fewer_rows_than_a_criterion_compares_are_named() -> None:
    loss = BridgeLoss(structkd.KDLoss() + structkd.RelationalLoss(), structkd.CORALLoss())
    feats = Features(logits=torch.randn(3, CLASSES), embedding=torch.randn(3, 5))
    two, one, none = torch.tensor([0, 2]), torch.tensor([1]), torch.tensor([], dtype=torch.int64)
    with pytest.raises(
        ValueError, match=r"has 2 row\(s\) with a pair, but RelationalLoss.*least 3"
    ):
        loss.terms(feats, feats.rows(two), TARGET, paired=two)
    with pytest.raises(ValueError, match=r"1 row\(s\) with a match, but CORALLoss.*out of matched"):
        loss.terms(feats, None, TARGET, matches=feats.rows(one), matched=one)
    assert list(loss.terms(feats, feats.rows(none), TARGET, paired=none)) == ["task"]


def test_a_criterion_that_needs_an_index_says_so() -> None:
    loss = BridgeLoss(structkd.ContrastiveRepresentationLoss(5, 5, 9, negatives=3))
    feats = FEATS.replace(embedding=torch.randn(3, 5))
    with pytest.raises(ValueError, match=r"needs student\.index.*feats\.replace\(index=index\)"):
        loss(feats, feats.rows(MASK), TARGET, paired=MASK)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"pair": "KDLoss"}, TypeError, "pair must be a structkd.Criterion or None, got str"),
        ({"match": nn.MSELoss()}, TypeError, "match must be a structkd.Criterion or None"),
        ({"task": structkd.SupervisionLoss()}, TypeError, "leave it out for the cross-entropy"),
        ({"task": "bce"}, TypeError, "task must be a function or module"),
        ({"pair_weight": torch.inf}, ValueError, "weight must be finite"),
    ],
)
def test_constructor_arguments_are_named(options, error, said: str) -> None:
    with pytest.raises(error, match=said):
        BridgeLoss(**options)


def test_a_task_that_averages_is_named() -> None:
    with pytest.raises(ValueError, match=r"task must return a loss a row.*reduction='none'"):
        BridgeLoss(task=nn.CrossEntropyLoss())(FEATS, None, TARGET)


def test_only_a_bridge_takes_rows_from_a_distiller() -> None:
    for criterion in (structkd.KDLoss(), [BridgeLoss(structkd.KDLoss())]):
        distiller = Distiller(Net(1, 5), Net(1, 6), criterion)
        with pytest.raises(TypeError, match=r"paired: only a BridgeLoss, by itself"):
            distiller(_images(0, 3, 1), TARGET, None, paired=MASK)
    distiller = Distiller(Net(1, 5), Net(1, 6), BridgeLoss(structkd.KDLoss()))
    with pytest.raises(ValueError, match=r"paired names 2 row\(s\)"):
        distiller(_images(0, 3, 1), TARGET, None, paired=MASK)
