"""Method names, sums of them, and what their criteria are handed."""

from __future__ import annotations

import pytest
import torch

from crossmodal.methods import METHODS, Setup, described, resolve
from structkd import DSLoss, Features, KDLoss

SETUP = Setup(samples=80, batch_size=6)


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
        ("dss", r"unknown method 'dss'; did you mean 'ds'\? known: alone, kd, alkd"),
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


def test_every_registered_method_reads_what_it_is_handed() -> None:
    target = torch.arange(6) % 5
    for name in (name for name in METHODS if not name.startswith("count")):
        plan = resolve(name)
        one = plan.layers == "one"
        student, teacher = (
            f.replace(
                intermediate=f.intermediate[1:2] if one else f.intermediate, index=torch.arange(6)
            )
            for f in (features(), features((16, 32, 64)))
        )
        criterion = plan.build(student, teacher, SETUP)
        if criterion is None:
            assert name == "alone"
            continue
        leaf = student.logits.clone().requires_grad_()
        maps = [value.clone().requires_grad_() for value in student.intermediate]
        rows = student.embedding.clone().requires_grad_()
        student = student.replace(logits=leaf, embedding=rows, intermediate=maps)
        criterion(student, teacher, target).backward()
        read = [value for value in (leaf, rows, *maps) if value.grad is not None]
        assert read, name
        if not one:  # asking for all stages means using all of them
            assert all(value.grad is not None and value.grad.any() for value in maps), name


def test_weights_are_those_of_the_registrys_sources() -> None:
    weights = {
        "kd": (0.1, 0.9), "ctkd": (0.1, 0.9), "lskd": (0.1, 1), "fitnets": (1, 100),
        "at": (1, 1000), "nst": (1, 50), "vid": (1, 1), "crd": (1, 0.8), "semckd": (1, 40),
        "rkd": (1, 1), "fsp": (1, 50), "cc": (1, 100), "dkd": (1, 1), "logits": (1, 0.1),
    }  # fmt: skip
    found = {name: (METHODS[name].supervision, METHODS[name].weight) for name in weights}
    assert found == weights


def test_unequal_channels_are_adapted_for_fsp_and_equal_ones_left_alone() -> None:
    student, teacher = features((8, 16, 32)), features((8, 16, 64))
    criterion = AdaptedStages(FlowMatrixLoss(flows="chain"), student, teacher)
    shapes = [tuple(p.shape) for p in criterion.parameters()]
    assert shapes == [(64, 32, 1, 1), (64,), (64,), (64,)]  # convolution, batch norm
    same = AdaptedStages(FlowMatrixLoss(flows="chain"), teacher, teacher)
    assert not list(same.parameters())
    assert same(teacher, teacher) == 0
    short = teacher.replace(intermediate=teacher.intermediate[:2])
    uneven = AdaptedStages(FlowMatrixLoss(flows="chain"), student, short)
    with pytest.raises(ValueError, match="as many flows, got 2 and 1"):
        uneven(student, short)


def test_adapted_tokens_are_treated_as_maps() -> None:
    maps_s, maps_t = features((3, 4)), features((5, 6))
    torch.manual_seed(0)
    criterion = AdaptedStages(FlowMatrixLoss(flows="chain"), maps_s, maps_t)
    tokens_s, tokens_t = (
        f.replace(intermediate=[m.flatten(2).transpose(1, 2) for m in f.intermediate])
        for f in (maps_s, maps_t)
    )
    torch.testing.assert_close(criterion(tokens_s, tokens_t), criterion(maps_s, maps_t))


def test_a_description_changes_with_every_option() -> None:
    student, teacher = features((16,)), features((32,))

    def description(name: str, **options: object) -> object:
        return described(resolve(name, {name: options}).build(student, teacher, SETUP))

    assert description("kd") == description("kd", temperature=4.0)
    variants = [
        description("kd"),
        description("kd", temperature=3.0),
        description("kd", weight=0.8),
        description("ds"),
        description("ds", gamma=1.0),
        description("ds", reduction="sum"),  # no part of DSLoss's repr
        description("ds", lambd=0.1),
        description("ds", sem_2=False),
        description("fitnets"),
        description("fitnets", kernel_size=3),
    ]
    assert all(variants[i] != other for i in range(len(variants)) for other in variants[:i])
