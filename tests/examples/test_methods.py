"""Method names, sums of them, and what their criteria are handed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from crossmodal.methods import METHODS, Setup, described, resolve, value
from crossmodal.methods.variants import VARIANTS, Weights, row
from crossmodal.methods.variants import plan as plan_of
from structkd import ConvAdapter, DSLoss, Features, KDLoss

SETUP = Setup(samples=80, batch_size=6)
ALL = Setup(samples=80, batch_size=6, stages=3)  # of `features()`


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
    assert resolve("alone").parts == ()
    assert resolve("kd").supervision == 0.1
    assert resolve("ds").supervision == 1.0


def test_kd_is_nine_tenths_of_kd_at_temperature_four() -> None:
    student, teacher = features(), features((16, 32, 64))
    criterion = resolve("kd").build(ALL)
    expected = 0.9 * KDLoss(temperature=4.0)(student, teacher)
    torch.testing.assert_close(criterion(student, teacher), expected)


def test_ds_leaves_the_cross_entropy_to_the_engine() -> None:
    student, teacher = features((16,)), features((32,))
    criterion = resolve("ds").build(SETUP)
    names = set(criterion.terms(student, teacher, torch.arange(6) % 5))
    assert names == {"SEM-1", "SEM-2", "DCM-1", "DCM-2"}


def test_a_sum_takes_each_criterion_at_its_own_weight() -> None:
    plan = resolve("kd+ds")
    assert (plan.name, plan.supervision) == ("kd+ds", 1.0)
    student, teacher = features((16,)), features((32,))
    torch.manual_seed(0)
    value = plan.build(SETUP)(student, teacher)
    torch.manual_seed(0)
    expected = 0.9 * KDLoss(temperature=4.0)(student, teacher) + DSLoss()(student, teacher)
    torch.testing.assert_close(value, expected)


def test_names_are_read_kindly() -> None:
    assert resolve(" KD + ds").name == "kd+ds"


def test_options_override_the_criterion_and_its_weight() -> None:
    student, teacher = features((16,)), features((32,))
    plan = resolve("kd", {"kd": {"temperature": 2.0, "weight": 0.5}})
    criterion = plan.build(SETUP)
    expected = 0.5 * KDLoss(temperature=2.0)(student, teacher)
    torch.testing.assert_close(criterion(student, teacher), expected)
    ds = resolve("ds", {"ds": {"terms": ["SEM-1", "SEM-2"]}}).build(SETUP)
    assert set(ds.terms(student, teacher)) == {"SEM-1", "SEM-2"}


def test_the_labels_weight_of_a_method_that_stands_alone() -> None:
    plan = resolve("ds:supervision=0")
    assert (plan.name, plan.supervision) == ("ds:supervision=0", 0.0)
    assert described(plan.build(SETUP)) == described(resolve("ds").build(SETUP))
    assert resolve("kd", {"kd": {"supervision": 0.5}}).supervision == 0.5
    with pytest.raises(ValueError, match="stands alone, got kd\\+ds; leave it out"):
        resolve("kd:supervision=0.5+ds")
    for wrong in ("-1", "true", "some"):
        with pytest.raises(ValueError, match="supervision must be a number of at least 0, got"):
            resolve(f"ds:supervision={wrong}")
    with pytest.raises(ValueError, match="method 'alone' has no option 'supervision=0'"):
        resolve("alone:supervision=0")
    with pytest.raises(ValueError, match="supervision is the first of --weights here"):
        plan_of(VARIANTS["full"], "kd:supervision=0.5", Weights())


def test_a_sum_captures_all_stages_and_one_stage_methods_read_the_last_but_one() -> None:
    plan = resolve("ds+nst")
    criterion = plan.build(ALL)
    criterion(features(), features((16, 64, 128)))
    shapes = {tuple(parameter.shape[:2]) for parameter in criterion.parameters()}
    assert (64, 16) in shapes  # the adapter, from the student's second stage to the teacher's
    assert plan.stages(["a", "b", "c"]) == ["a", "b", "c"]
    assert resolve("ds").stages(["a", "b", "c"]) == ["b"]
    assert resolve("ds").stages(["a"]) == ["a"]


def test_options_are_written_after_the_name_and_are_part_of_it() -> None:
    plan = resolve("kd:temperature=2,weight=0.5+ds:terms=[SEM-1,SEM-2],gamma=(5, 0.02)")
    assert plan.options == {
        "kd": {"temperature": 2, "weight": 0.5},
        "ds": {"terms": ("SEM-1", "SEM-2"), "gamma": (5, 0.02)},
    }
    assert plan.name == "kd:temperature=2,weight=0.5+ds:terms=[SEM-1,SEM-2],gamma=[5,0.02]"
    assert resolve(plan.name).options == plan.options
    assert [value(text) for text in ("none", "1e-3", "mlp", "true")] == [None, 1e-3, "mlp", True]
    with pytest.raises(
        ValueError, match="method 'ds' has no option 'gama=3'; did you mean 'gamma'"
    ):
        resolve("ds:gama=3")
    with pytest.raises(ValueError, match="method 'alone' has no option 'x=1'"):
        resolve("alone:x=1")


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
    for name in METHODS:
        plan = resolve(name)
        if not plan.parts:
            assert name == "alone"
            continue
        whole = len(plan.stages(["a", "b", "c"])) == 3
        student, teacher = (
            f.replace(
                intermediate=f.intermediate if whole else f.intermediate[1:2],
                index=torch.arange(6),
            )
            for f in (features(), features((16, 32, 64)))
        )
        criterion = plan.build(replace(SETUP, stages=3 if whole else 1))
        leaf = student.logits.clone().requires_grad_()
        maps = [value.clone().requires_grad_() for value in student.intermediate]
        rows = student.embedding.clone().requires_grad_()
        student = student.replace(logits=leaf, embedding=rows, intermediate=maps)
        loss = criterion(student, teacher, target)
        loss.backward()
        read = [value for value in (leaf, rows, *maps) if value.grad is not None]
        assert read, name
        if whole and name != "ska":  # asking for all stages means using all of them
            assert all(value.grad is not None and value.grad.any() for value in maps), name


def test_weights_are_those_of_the_registrys_sources() -> None:
    weights = {
        "kd": (0.1, 0.9), "ctkd": (0.1, 0.9), "lskd": (0.1, 9), "fitnets": (1, 100),
        "at": (1, 1000), "nst": (1, 50), "vid": (1, 1), "crd": (1, 0.8), "semckd": (1, 40),
        "rkd": (1, 1), "fsp": (1, 50), "cc": (1, 100), "dkd": (1, 1), "logits": (1, 0.1),
    }  # fmt: skip
    found = {name: (METHODS[name].supervision, METHODS[name].weight) for name in weights}
    assert found == weights


def test_fitnets_has_the_benchmarks_regressor() -> None:
    criterion = resolve("fitnets").build(SETUP)
    student, teacher = features((8,)), features((16,))
    found = criterion(student, teacher)
    convolution, norm = (
        next(module for module in criterion.modules() if isinstance(module, kind))
        for kind in (torch.nn.Conv2d, torch.nn.BatchNorm2d)
    )
    (map_s,), (map_t,) = student.intermediate, teacher.intermediate
    expected = 100 * (norm(convolution(map_s)).relu() - map_t).square().mean()
    torch.testing.assert_close(found, expected)


def test_one_weight_of_the_logarithm_fits_a_teacher_of_any_scale() -> None:
    student, teacher = features(), features((16, 32, 64))
    plan = resolve("fitnets_all:form=log,weight=5")
    assert plan.name == "fitnets_all:form=log,weight=5"
    criterion = plan.build(ALL)
    criterion(student, teacher)
    for part in criterion.modules():
        if isinstance(part, ConvAdapter):  # so that the regressor says 0
            torch.nn.init.zeros_(part.conv.weight)
            torch.nn.init.zeros_(part.conv.bias)
    louder = teacher.replace(intermediate=tuple(100 * value for value in teacher.intermediate))
    value = criterion(student, teacher)
    torch.testing.assert_close(criterion(student, louder), value)
    # log 1.01 of each of three stages where the means are 0, which they nearly are.
    assert 0 < float(value.detach()) < 3 * 5 * 0.05


def test_a_description_changes_with_every_option() -> None:
    def description(name: str, **options: object) -> object:
        return described(resolve(name, {name: options}).build(SETUP))

    assert description("kd") == description("kd", temperature=4.0)
    variants = [
        description("kd"),
        description("kd", temperature=3.0),
        description("kd", weight=0.8),
        description("ds"),
        description("ds", gamma=1.0),
        description("ds", reduction="sum"),  # no part of DSLoss's repr
        description("ds", lambd=0.1),
        description("ds", terms=["SEM-1", "DCM-1", "DCM-2"]),
        description("fitnets"),
        description("fitnets", kernel_size=3),
        description("fitnets", form="log"),
    ]
    assert all(variants[i] != other for i in range(len(variants)) for other in variants[:i])


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("bridge", "bridge"),
        ("bridge+kd+ds", "bridge + kd+ds"),
    ],
)
def test_rows_over_the_bridge_by_their_names(name: str, title: str) -> None:
    variant, plan = row(name, "crd", Weights())
    assert (variant.first, plan.name) == ("none", title)
    assert plan.bridged
    assert plan.supervision == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("coral", "unknown variant 'coral'"),
        ("bridge+kdd", "unknown method 'kdd'; did you mean 'kd'"),
        ("bridge+kd+ssm", "unknown method 'ssm'"),
        ("bridg", "unknown variant 'bridg'"),
        ("bridge+kd:supervision=1", "the labels weigh 1 over a bridge"),
    ],
)
def test_a_row_that_is_none_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        row(name, "kd", Weights())


def test_the_parts_of_ds_take_their_options_beside_the_variants() -> None:
    for variant, cross_sign in (("measured", "align"), ("printed", "separate")):
        ds = resolve(f"ds:variant={variant},projector=mlp,projector_dim=64,pool=4").build(SETUP)
        (criterion,) = (part for part in ds.modules() if isinstance(part, DSLoss))
        assert (criterion.sem.center, criterion.dcm.cross_sign) == (
            variant == "measured",
            cross_sign,
        )
        assert criterion.dcm.pool == 4
        assert criterion.terms(features((16,)), features((32,))).keys() == {
            "SEM-1", "SEM-2", "DCM-1", "DCM-2",
        }  # fmt: skip
        assert (64, 16) in {tuple(value.shape) for value in criterion.sem.parameters()}
