"""Method names, sums of them, and what their criteria are handed."""

from __future__ import annotations

import pytest
import torch

from crossmodal import methods
from crossmodal.methods import METHODS, Method, Setup, resolve, stages
from structkd import DSLoss, Features, KDLoss
from structkd.criteria.base import Criterion

SETUP = Setup(classes=5, samples=80, steps=10)


class StageCount(Criterion):
    """Gives the number of maps it was handed."""

    reads = ("intermediate",)

    def compute(
        self, student: Features, teacher: Features, target: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        return {"stages": student.intermediate[0].new_tensor(len(student.intermediate))}


@pytest.fixture(autouse=True)
def counting_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    for layers in ("one", "all"):
        entry = Method(lambda s, t, setup: StageCount(), layers=layers)
        monkeypatch.setitem(METHODS, f"count-{layers}", entry)


def features(widths: tuple[int, ...] = (8, 16, 32)) -> Features:
    generator = torch.Generator().manual_seed(sum(widths))
    maps = tuple(torch.randn(6, w, 4, 4, generator=generator) for w in widths)
    return Features(
        logits=torch.randn(6, 5, generator=generator),
        embedding=torch.randn(6, widths[-1], generator=generator),
        intermediate=maps,
    )


def test_weights_of_the_single_methods() -> None:
    assert resolve("alone").supervision == 1.0
    assert resolve("alone").build(features(), features(), SETUP) is None
    assert resolve("kd").supervision == 0.1
    assert resolve("ds").supervision == 1.0


def test_kd_is_nine_tenths_of_kd_at_temperature_four() -> None:
    student, teacher = features(), features((16, 32, 64))
    criterion = resolve("kd").build(student, teacher, SETUP)
    expected = 0.9 * KDLoss(temperature=4.0)(student, teacher)
    torch.testing.assert_close(criterion(student, teacher), expected)


def test_ds_leaves_the_cross_entropy_to_the_engine() -> None:
    student, teacher = features((16,)), features((32,))
    criterion = resolve("ds").build(student, teacher, SETUP)
    names = set(criterion.terms(student, teacher, torch.arange(6) % 5))
    assert names == {"SEM-1", "SEM-2", "DCM-1", "DCM-2"}


def test_a_sum_takes_each_criterion_at_its_own_weight() -> None:
    plan = resolve("kd+ds")
    assert (plan.name, plan.supervision) == ("kd+ds", 1.0)
    student, teacher = features((16,)), features((32,))
    torch.manual_seed(0)
    criterion = plan.build(student, teacher, SETUP)
    torch.manual_seed(0)
    ds = DSLoss.from_features(student, teacher, srm=False)
    expected = 0.9 * KDLoss(temperature=4.0)(student, teacher) + ds(student, teacher)
    torch.testing.assert_close(criterion(student, teacher), expected)


def test_names_are_read_kindly() -> None:
    assert resolve(" KD + ds").name == "kd+ds"


def test_options_override_the_criterion_and_its_weight() -> None:
    student, teacher = features((16,)), features((32,))
    plan = resolve("kd", {"kd": {"temperature": 2.0, "weight": 0.5}})
    criterion = plan.build(student, teacher, SETUP)
    expected = 0.5 * KDLoss(temperature=2.0)(student, teacher)
    torch.testing.assert_close(criterion(student, teacher), expected)
    ds = resolve("ds", {"ds": {"dcm_1": False, "dcm_2": False}}).build(student, teacher, SETUP)
    assert set(ds.terms(student, teacher)) == {"SEM-1", "SEM-2"}


def test_each_part_of_a_sum_gets_its_own_layers() -> None:
    assert resolve("count-one").layers == "one"
    plan = resolve("count-one+count-all")
    assert plan.layers == "all"
    criterion = plan.build(features(), features(), SETUP)
    terms = criterion.terms(features(), features())
    assert sorted(value.item() for value in terms.values()) == [1, 3]


def test_one_stage_is_the_last_but_one() -> None:
    plan = resolve("ds+count-all")
    criterion = plan.build(features(), features((16, 64, 128)), SETUP)
    shapes = {tuple(parameter.shape[:2]) for parameter in criterion.parameters()}
    assert (64, 16) in shapes  # the adapter, from the student's second stage to the teacher's
    assert stages(["a", "b", "c"], "one") == ["b"]
    assert stages(["a"], "one") == ["a"]
    assert stages(["a", "b", "c"], "all") == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dss", r"unknown method 'dss'; did you mean 'ds'\? known: alone, kd, ds"),
        ("kd+", "unknown method ''"),
        ("kd+kd", "names a part twice"),
        ("alone+kd", "'alone' has no criterion"),
    ],
)
def test_names_that_mean_nothing(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(name)


def test_options_for_a_part_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="options for ds, but method 'kd' has kd"):
        resolve("kd", {"ds": {"gamma": 1.0}})


def test_every_registered_method_builds() -> None:
    for name in METHODS:
        plan = methods.resolve(name)
        student, teacher = features(), features((16, 32, 64))
        one = plan.layers == "one"
        pair = [
            f.replace(intermediate=f.intermediate[1:2]) if one else f for f in (student, teacher)
        ]
        index = torch.arange(6)
        pair = [f.replace(index=index) for f in pair]
        criterion = plan.build(*pair, SETUP)
        assert criterion is None or criterion(*pair, torch.arange(6) % 5).isfinite()
