"""Every public criterion takes its shape from the first features that it meets."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import structkd
from structkd import Criterion, CriterionSum, Features
from structkd.criteria import build_criterion
from structkd.projectors import is_unshaped
from tests.criteria.test_contract import PUBLIC

BATCH, CLASSES = 6, 5
OPTIONS: dict[str, dict[str, Any]] = {
    "ChannelWiseLoss": {"source": "intermediate"},
    "ContrastiveRepresentationLoss": {"dataset_size": 20, "negatives": 4},
    "AdversarialFeatureLoss": {"source": "intermediate"},
    "SemanticAlignmentLoss": {"heads": 2},
    "DSLoss": {"srm": True},
}
SHAPES = {
    "maps": lambda width: ((width, 4, 4), (2 * width, 2, 2)),
    "tokens": lambda width: ((16, width), (9, 2 * width)),
    "rows": lambda width: ((width,), (2 * width,)),
}
# On one position attention and selectivity are 0 whatever the maps hold.
NEED_POSITIONS = ("AttentionTransferLoss", "ChannelWiseLoss", "NeuronSelectivityLoss")
every_public = pytest.mark.parametrize("kind", PUBLIC, ids=lambda kind: kind.__name__)


def _network(layout: str, width: int, dtype: torch.dtype = torch.float32) -> Features:
    rng = torch.Generator().manual_seed(width)

    def randn(*shape: int) -> Tensor:
        return torch.randn(BATCH, *shape, generator=rng, dtype=dtype).requires_grad_()

    return Features(
        logits=randn(CLASSES),
        embedding=randn(width),
        intermediate=tuple(randn(*shape) for shape in SHAPES[layout](width)),
        index=torch.arange(BATCH),
    )


TARGET = torch.arange(BATCH) % CLASSES


def _make(kind: type[Criterion]) -> Criterion:
    torch.manual_seed(0)
    return kind(**OPTIONS.get(kind.__name__, {}))


@every_public
@pytest.mark.parametrize("layout_t", list(SHAPES))
@pytest.mark.parametrize("layout_s", list(SHAPES))
def test_any_student_meets_any_teacher(kind, layout_s: str, layout_t: str) -> None:
    student, teacher = _network(layout_s, 6), _network(layout_t, 8)
    criterion = _make(kind)
    if kind.__name__ in NEED_POSITIONS and "rows" in (layout_s, layout_t):
        with pytest.raises(ValueError, match=r"share one only.*capture an earlier layer"):
            criterion(student, teacher, TARGET)
        return
    value = criterion(student, teacher, TARGET)
    assert value.isfinite()
    value.backward()
    reached = [student.logits.grad, student.embedding.grad]
    reached += [value.grad for value in student.intermediate]
    assert any(grad is not None and grad.abs().max() > 0 for grad in reached)
    assert not is_unshaped(criterion)


@every_public
def test_the_criterion_has_the_precision_of_the_features(kind) -> None:
    student, teacher = (_network("maps", width, torch.float64) for width in (6, 8))
    criterion = _make(kind)
    if kind is structkd.CurriculumTemperatureLoss:
        criterion.double()  # what it has from the start has a precision already
    criterion(student, teacher, TARGET)
    assert all(p.dtype == torch.float64 for p in criterion.parameters())


@every_public
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_first_call_in_inference_mode_leaves_it_trainable(kind, dtype) -> None:
    criterion = _make(kind)
    if kind is structkd.CurriculumTemperatureLoss:
        criterion.to(dtype)
    with torch.inference_mode():  # Lightning validates a little before it trains
        criterion.eval()(_network("maps", 6, dtype), _network("maps", 8, dtype), TARGET)
    assert not any(v.is_inference() for v in (*criterion.parameters(), *criterion.buffers()))
    student = _network("maps", 6, dtype)
    criterion.train()(student, _network("maps", 8, dtype), TARGET).backward()
    assert is_unshaped(criterion) is False


@every_public
def test_an_optimizer_made_before_the_first_call_trains_all_of_it(kind) -> None:
    student, teacher = _network("maps", 6), _network("maps", 8)
    criterion = _make(kind)
    given = [p for p in criterion.parameters() if p.requires_grad]
    if not given:
        pytest.skip("trains nothing")
    optimizer = torch.optim.AdamW(given, lr=0.1)
    # One step may leave a layer alone whose only way out starts at zero.
    for step in range(3):
        loss = criterion(student, teacher, TARGET)
        if not step:
            before = [p.detach().clone() for p in criterion.parameters() if p.requires_grad]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    trained = [p for p in criterion.parameters() if p.requires_grad]
    assert {id(p) for p in trained} <= {id(p) for p in given}
    for old, new in zip(before, trained, strict=True):
        assert not torch.equal(old, new)


@every_public
def test_a_state_loads_into_one_that_never_ran_and_copies_keep_their_shape(kind) -> None:
    student, teacher = _network("maps", 6), _network("maps", 8)
    criterion = _make(kind)
    criterion.load_state_dict(criterion.state_dict())  # nothing has a shape yet
    early = copy.deepcopy(criterion)
    criterion(student, teacher, TARGET)
    state = copy.deepcopy(criterion.state_dict())
    wanted = criterion.eval()(student, teacher, TARGET)
    for other in (_make(kind), early):
        other.load_state_dict(state)
        optimizer = torch.optim.SGD([*other.parameters(), torch.zeros(1)], lr=0.1)
        value = other.eval()(student, teacher, TARGET)
        torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-7)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert {id(p) for p in other.parameters()} <= held
    assert other.state_dict().keys() == state.keys()


@every_public
def test_other_widths_than_the_first_are_named(kind) -> None:
    student, teacher = _network("maps", 6), _network("maps", 8)
    criterion = _make(kind)
    criterion(student, teacher, TARGET)
    if not list(criterion.parameters()) or kind is structkd.CurriculumTemperatureLoss:
        pytest.skip("has no shape")
    wider = _network("maps", 10)
    if "logits" in criterion.reads:
        wider = wider.replace(logits=torch.randn(BATCH, 7))
        teacher = teacher.replace(logits=torch.randn(BATCH, 7))
    with pytest.raises(ValueError, match=r"first call|took its shape|make a new"):
        criterion(wider, teacher, TARGET)


@every_public
def test_an_option_that_does_not_exist_is_named_with_its_like(kind) -> None:
    spec = {"type": kind.__name__, "gathr": True, **OPTIONS.get(kind.__name__, {})}
    with pytest.raises(TypeError, match=rf"{kind.__name__} has no option 'gathr'.*gather"):
        build_criterion(spec)


@every_public
def test_its_dict_says_what_its_constructor_says(kind) -> None:
    options = OPTIONS.get(kind.__name__, {})
    made = build_criterion({"type": kind.__name__, **options})
    assert type(made) is kind
    assert repr(made) == repr(kind(**options))
    weighted = build_criterion({"type": kind, "weight": 3.0, **options})
    assert weighted.weights == {kind.__name__: 3.0}
    student, teacher = _network("maps", 6), _network("maps", 8)
    made(student, teacher, TARGET)
    (member,) = weighted.criteria.values()
    member(student, teacher, TARGET)
    member.load_state_dict(made.state_dict())
    value, heavy = (c.eval()(student, teacher, TARGET) for c in (made, weighted))
    torch.testing.assert_close(heavy, 3 * value)


def test_the_line_that_was_asked_for() -> None:
    feats_s, feats_t = _network("maps", 6), _network("maps", 8)
    loss = structkd.DSLoss()(feats_s, feats_t)
    assert loss.isfinite()
    fields = ("logits", "embedding", "intermediate")
    feats_s, feats_t = ({name: getattr(f, name) for name in fields} for f in (feats_s, feats_t))
    loss = structkd.DSLoss()(feats_s, feats_t)
    loss.backward()
    printed = structkd.DSLoss(gamma=0.1, variant="printed")
    assert list(printed.terms(feats_s, feats_t)) == ["SEM-1", "SEM-2", "DCM-1", "DCM-2"]
    some = structkd.DSLoss(terms=["SEM-1", "DCM-1"])
    assert list(some.terms(feats_s, feats_t)) == ["SEM-1", "DCM-1"]
    whole = structkd.DSLoss(sem=structkd.CrossCorrelationLoss(lambd=0.01), srm=True)
    assert next(iter(whole.terms(feats_s, feats_t, TARGET))) == "SRM"
    assert whole.sem.lambd == 0.01


def test_a_part_can_be_said_in_a_dict() -> None:
    spec = {"type": "DSLoss", "sem": {"type": "CrossCorrelationLoss", "lambd": 0.01}, "weight": 2}
    made = build_criterion(spec).criteria["DSLoss"]
    assert made.sem.lambd == 0.01
    with pytest.raises(TypeError, match="sem must be a CrossCorrelationLoss or None, got KDLoss"):
        build_criterion({"type": "DSLoss", "sem": {"type": "KDLoss"}})


def test_a_weight_has_one_meaning_for_a_users_own_criterion_too() -> None:
    class Weighted(structkd.KDLoss):
        def __init__(self, weight: float = 9.0) -> None:
            super().__init__()
            self.weight = weight

    with pytest.raises(TypeError, match="option 'weight' of its own"):
        build_criterion({"type": Weighted, "weight": 9.0})
    with pytest.raises(TypeError, match="option 'weight' of its own"):
        build_criterion({"type": Weighted})
    assert build_criterion(Weighted(9.0)).weight == 9.0


def test_what_the_caller_gives_is_taken_as_it_is() -> None:
    own = torch.nn.Linear(6, 8)
    for kind in (structkd.CORALLoss, structkd.CrossCorrelationLoss):
        assert kind(student_projector=own).student_projector is own
    adapter = torch.nn.Conv2d(6, 8, 3, padding=1)
    student, teacher = _network("maps", 6), _network("maps", 8)
    for criterion in (
        structkd.UniformityCalibrationLoss(adapter=adapter, layer=0),
        structkd.FitNetLoss(adapter=adapter, layer=0),
        structkd.SemanticAlignmentLoss(adapter=adapter, layer=0),
        structkd.FlowMatrixLoss("chain", adapters=[adapter, torch.nn.Conv2d(12, 16, 1)]),
    ):
        assert any(part is adapter for part in criterion.modules())
        criterion(student, teacher).backward()
        assert adapter.weight.grad.abs().max() > 0
        adapter.zero_grad()
    with pytest.raises(ValueError, match=r"bring .* to the teacher's 8 channels, got .*5"):
        structkd.FitNetLoss(adapter=torch.nn.Conv2d(6, 5, 1), layer=0)(student, teacher)


def test_gather_is_never_set_on_what_was_handed_in() -> None:
    sem = structkd.CrossCorrelationLoss()
    with pytest.raises(ValueError, match=r"gather=True, but sem was made without"):
        structkd.DSLoss(sem=sem, gather=True)
    assert not sem.gather
    assert structkd.DSLoss(gather=True).dcm.gather


def test_members_of_a_sum_load_whatever_their_order() -> None:
    student, teacher = _network("maps", 6), _network("maps", 8)
    make = lambda: (structkd.FitNetLoss(), structkd.CorrelationCongruenceLoss())  # noqa: E731
    (fit, cc), (other_fit, other_cc) = make(), make()
    saved, other = fit + 0.5 * cc, 0.5 * other_cc + other_fit
    saved(student, teacher)
    other.load_state_dict(saved.state_dict())
    torch.testing.assert_close(other(student, teacher), saved(student, teacher))
    named = CriterionSum({"hint": fit, "kernel": cc}, {"kernel": 0.5})
    torch.testing.assert_close(named(student, teacher), saved(student, teacher))
    assert {name.split(".")[1] for name in named.state_dict()} == {"hint", "kernel"}
    stages = [{"type": "FitNetLoss", "name": f"stage_{k}", "layer": k} for k in (3, 4)]
    assert list(build_criterion(stages).weights) == ["stage_3", "stage_4"]


def test_a_number_that_yaml_reads_as_text_is_told() -> None:
    for said in ("weight: 1e-3", "temperature: 1e-3"):
        spec = yaml.safe_load(f"{{type: KDLoss, {said}}}")
        with pytest.raises(TypeError, match=r"must be a number, got str '1e-3'; YAML.*1\.0e-3 as"):
            build_criterion(spec)


def test_epochs_count_inside_sums_and_once() -> None:
    ctkd = structkd.CurriculumTemperatureLoss()
    whole = 0.5 * (structkd.KDLoss() + 2 * ctkd) + structkd.LogitMSELoss()
    whole.step_epoch()
    assert int(ctkd.epoch) == 2


def test_the_falling_share_is_a_number_of_its_own() -> None:
    assert structkd.falling(0, 8) == 1
    assert structkd.falling(8, 8) == structkd.falling(9, 8) == 0
    for step, steps in ((-1, 4), (1, 0)):
        with pytest.raises(ValueError, match="must be at least"):
            structkd.falling(step, steps)
