"""Every criterion keeps the same contract (see tests/cases/case.py)."""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import pickle
import pkgutil
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import structkd
import tests.cases
from structkd import Criterion, Features
from structkd.criteria import CRITERIA
from structkd.criteria.base import _mapped
from structkd.projectors import is_unshaped
from tests.cases.case import Case, Example, moved, on
from tests.devices import ACCELERATOR, no_wait

CASES: list[Case] = [
    case
    for module in pkgutil.iter_modules(tests.cases.__path__)
    for case in getattr(importlib.import_module(f"tests.cases.{module.name}"), "CASES", [])
]
PUBLIC: list[type[Criterion]] = list(CRITERIA.values())
IDS = [case.name for case in CASES]
# The same cases on the accelerator, where there is one.
THERE = [
    pytest.param(on(case, ACCELERATOR), id=f"{case.name}-accelerator", marks=pytest.mark.gpu)
    for case in CASES
    if ACCELERATOR
]
NOWHERE = pytest.param(None, id="accelerator", marks=pytest.mark.skip(reason="no CUDA device"))
on_the_cpu = pytest.mark.parametrize("case", CASES, ids=IDS)
on_the_accelerator = pytest.mark.parametrize("case", THERE or [NOWHERE])
every_case = pytest.mark.parametrize(
    "case", [*(pytest.param(case, id=case.name) for case in CASES), *THERE]
)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _leaves(case: Case, features: Features) -> list[Tensor]:
    found = []
    for field in case.reads:
        value = getattr(features, field)
        found += list(value) if field == "intermediate" else [value] if value is not None else []
    return found


def _make(case: Case, seed: int = 0, batch: int = 5) -> Example:
    example = case.make(seed, max(batch, case.min_batch))
    require = lambda value: value.detach().clone().requires_grad_()  # noqa: E731
    return replace(
        example,
        student=_mapped(example.student, require),
        teacher=_mapped(example.teacher, require),
    )


def _run(example: Example) -> Tensor:
    return example.criterion(example.student, example.teacher, example.target)


def _given(example: Example) -> tuple[Features, Features, Tensor | None]:
    return example.student, example.teacher, example.target


def _float32(example: Example) -> Example:
    """The same example in float32; autocast leaves float64 alone."""
    student, teacher = (_mapped(f, Tensor.float) for f in (example.student, example.teacher))
    return Example(example.criterion.float(), student, teacher, example.target)


@every_case
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**16), batch=st.integers(1, 6))
def test_value_and_gradient_equal_the_definition(case: Case, seed: int, batch: int) -> None:
    ours, definition = _make(case, seed, batch), _make(case, seed, batch)
    # The definition first: a criterion with a memory changes it when it runs.
    wanted, value = case.oracle(definition), _run(ours)
    torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-10)
    if not case.gradcheck:
        return
    grads = torch.autograd.grad(value, _leaves(case, ours.student), allow_unused=True)
    expected = torch.autograd.grad(
        wanted, _leaves(case, definition.student), allow_unused=True, materialize_grads=True
    )
    for got, want in zip(grads, expected, strict=True):
        got = torch.zeros_like(want) if got is None else got
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)


@every_case
def test_gradcheck(case: Case) -> None:
    if not (case.gradcheck and case.pure):
        pytest.skip("its gradient is not its value's: reversed, sampled or with a memory")
    example = _make(case, batch=3)
    leaves = _leaves(case, example.student)

    def value(*inputs: Tensor) -> Tensor:
        given, feats = list(inputs), example.student
        for field in case.reads:
            if field == "intermediate":
                taken = tuple(given.pop(0) for _ in feats.intermediate)
                feats = feats.replace(intermediate=taken)
            elif getattr(feats, field) is not None:
                feats = feats.replace(**{field: given.pop(0)})
        return example.criterion(feats, example.teacher, example.target)

    # Along random directions: entry by entry it is compared with the definition's. A GPU may add up
    # in another order each time.
    assert torch.autograd.gradcheck(value, leaves, atol=1e-5, fast_mode=True, nondet_tol=1e-12)


@every_case
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_finite_over_dtypes_and_scales(case: Case, dtype: torch.dtype) -> None:
    for scale in case.scales if dtype == torch.float32 else case.half_scales:
        example = case.make(0, max(5, case.min_batch))
        example.criterion.float()
        cast = lambda value, s=scale: (value * s).to(dtype)  # noqa: E731
        student = _mapped(example.student, lambda v, c=cast: c(v).requires_grad_())
        value = example.criterion(student, _mapped(example.teacher, cast), example.target)
        assert value.dtype == torch.float32
        assert value.shape == ()
        assert value.isfinite(), f"value at scale {scale}"
        value.backward()
        reached = [leaf for leaf in _leaves(case, student) if leaf.grad is not None]
        assert reached, "no gradient reaches the student"
        for leaf in reached:
            assert leaf.grad.dtype == dtype
            assert leaf.grad.isfinite().all(), f"gradient at scale {scale}"


@every_case
def test_teacher_gets_no_gradient(case: Case) -> None:
    example = _make(case)
    _run(example).backward()
    assert any(leaf.grad is not None for leaf in _leaves(case, example.student))
    assert all(leaf.grad is None for leaf in _leaves(case, example.teacher))


@every_case
def test_terms_sum_to_the_value(case: Case) -> None:
    terms = _make(case)
    value = _run(_make(case))
    named = terms.criterion.terms(terms.student, terms.teacher, terms.target)
    assert named
    assert all(term.shape == () for term in named.values())
    torch.testing.assert_close(torch.stack(list(named.values())).sum(), value)


@every_case
def test_sum_with_another_criterion(case: Case) -> None:
    value = _run(_make(case))
    example = _make(case)
    first = _leaves(case, example.student)[0]
    logits = torch.eye(len(first), 7, dtype=torch.float64, device=first.device)
    add = lambda feats: feats if feats.logits is not None else feats.replace(logits=logits)  # noqa: E731
    student, teacher = add(example.student), add(example.teacher)
    if teacher.logits.shape != student.logits.shape:
        teacher = teacher.replace(logits=student.logits.detach())
    both = 2 * example.criterion + 0.5 * structkd.KDLoss(form="sigmoid")
    other = 0.5 * structkd.KDLoss(form="sigmoid")(student, teacher)
    if "logits" in case.reads and teacher.logits is not example.teacher.logits:
        pytest.skip("needs a teacher without logits")
    torch.testing.assert_close(both(student, teacher, example.target), 2 * value + other)


@every_case
def test_order_of_the_batch_does_not_matter(case: Case) -> None:
    if not case.order_free:
        pytest.skip("order is part of its definition")
    value = _run(_make(case))
    example = _make(case)
    order = torch.randperm(
        len(_leaves(case, example.student)[0]), generator=torch.Generator().manual_seed(1)
    )
    shuffled = replace(
        example,
        student=_mapped(example.student, lambda v: v[order]).replace(
            index=None if example.student.index is None else example.student.index[order]
        ),
        teacher=_mapped(example.teacher, lambda v: v[order]).replace(
            index=None if example.teacher.index is None else example.teacher.index[order]
        ),
        target=None if example.target is None else example.target[order],
    )
    torch.testing.assert_close(_run(shuffled), value, rtol=1e-8, atol=1e-10)


@every_case
def test_state_dict_round_trip(case: Case, tmp_path) -> None:
    example = _make(case)
    _run(example)  # a memory, if any, moves
    path = tmp_path / "criterion.pt"
    torch.save(example.criterion.state_dict(), path)
    other = case.make(0, max(5, case.min_batch)).criterion
    if not is_unshaped(other):
        for parameter in other.parameters():
            torch.nn.init.zeros_(parameter)
    other.load_state_dict(torch.load(path, weights_only=True))
    again = replace(example, criterion=other)
    torch.testing.assert_close(_run(again), _run(example), rtol=0, atol=0)


@every_case
def test_pure_call_repeats(case: Case) -> None:
    if not case.pure:
        pytest.skip("has a memory or samples")
    example = _make(case)
    torch.testing.assert_close(_run(example), _run(example), rtol=0, atol=0)


@every_case
def test_compiles_whole(case: Case) -> None:
    torch._dynamo.reset()
    wanted = _run(_make(case))
    example = _make(case)
    compiled = torch.compile(example.criterion, backend="aot_eager", fullgraph=True)
    value = compiled(example.student, example.teacher, example.target)
    torch.testing.assert_close(value, wanted)
    value.backward()
    assert all(leaf.grad is None for leaf in _leaves(case, example.teacher))


@every_case
def test_autocast_changes_nothing(case: Case) -> None:
    wanted, example = _run(_float32(_make(case))), _float32(_make(case))
    with torch.autocast(_leaves(case, example.student)[0].device.type, torch.bfloat16):
        value = _run(example)
    torch.testing.assert_close(value, wanted, rtol=0, atol=0)


@every_case
def test_teacher_from_inference_mode(case: Case) -> None:
    wanted = _run(_make(case))
    example = _make(case)
    with torch.inference_mode():
        teacher = _mapped(example.teacher, lambda v: v.clone())
    value = _run(replace(example, teacher=teacher))
    value.backward()
    torch.testing.assert_close(value, wanted)


@every_case
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_nan_in_is_nan_out(case: Case, side: str) -> None:
    example = _make(case)
    if not _leaves(case, getattr(example, side)):
        pytest.skip(f"does not read the {side}")
    spoiled = _mapped(getattr(example, side), lambda v: torch.full_like(v, float("nan")))
    assert _run(replace(example, **{side: spoiled})).isnan()


@every_case
def test_zero_at_the_optimum(case: Case) -> None:
    if case.zero is None:
        pytest.skip("has no optimum of 0")
    value = _run(case.zero(3))
    assert 0 <= float(value.detach()) < 1e-12


@every_case
def test_batches_that_differ_are_named(case: Case) -> None:
    if not case.reads_teacher:
        pytest.skip("does not read the teacher")
    example = _make(case)
    shorter = _mapped(example.teacher, lambda v: torch.cat([v, v]))
    with pytest.raises(ValueError, match=r"same samples.*batch size"):
        _run(replace(example, teacher=shorter))


@every_case
def test_integers_are_named(case: Case) -> None:
    example = _make(case)
    whole = _mapped(example.student, lambda v: v.detach().long())
    with pytest.raises(TypeError, match=r"student\.\w+.* floating-point.* int64"):
        _run(replace(example, student=whole))


@every_case
def test_wrong_rank_is_named(case: Case) -> None:
    example = _make(case)
    flat = _mapped(example.student, lambda v: v.detach().flatten())
    with pytest.raises(ValueError, match=r"student\.\w+.* must be .*got float64"):
        _run(replace(example, student=flat))


@every_case
def test_missing_features_are_named(case: Case) -> None:
    example = _make(case)
    with pytest.raises(ValueError, match=r"(?s)student\.(\w+).*(Capture|Distiller)"):
        _run(replace(example, student=Features()))
    with pytest.raises(TypeError, match="student must be Features"):
        _run(replace(example, student="logits"))


@every_case
def test_too_small_a_batch_is_named(case: Case) -> None:
    if case.min_batch == 1:
        assert _run(case.make(0, 1)).isfinite()
        return
    example = case.make(0, case.min_batch)
    cut = slice(0, case.min_batch - 1)
    with pytest.raises(ValueError, match=f"at least {case.min_batch}"):
        _run(
            replace(
                example,
                student=_mapped(example.student, lambda v: v[cut]),
                teacher=_mapped(example.teacher, lambda v: v[cut]),
                target=None if example.target is None else example.target[cut],
            )
        )


@every_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_loops_leave_the_criterion_exact(case: Case, dtype: torch.dtype) -> None:
    """Loops that call ``.half()`` on all of a model must not round what a criterion holds."""
    plain, moved = _make(case), _make(case)
    plain.criterion.float()
    torch.nn.ModuleList([moved.criterion.float()]).to(dtype)
    for name, value in moved.criterion.state_dict().items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(value, plain.criterion.state_dict()[name], rtol=0, atol=0)
    student, teacher = (
        _mapped(feats, lambda v: v.detach().to(dtype)) for feats in (plain.student, plain.teacher)
    )
    wanted = plain.criterion(student, teacher, plain.target)
    value = moved.criterion(student, teacher, moved.target)
    torch.testing.assert_close(value, wanted, rtol=0, atol=0)
    assert value.dtype == torch.float32


@every_case
def test_division_is_multiplication_by_the_inverse(case: Case) -> None:
    half = (_make(case).criterion / 2)(*_given(_make(case)))
    torch.testing.assert_close(half, _run(_make(case)) / 2)
    with pytest.raises(ZeroDivisionError, match="divided by 0"):
        _make(case).criterion / 0


@on_the_cpu
def test_its_dict_its_constructor_and_its_repr_have_the_same_words(case: Case) -> None:
    criterion = _make(case).criterion
    parameters = inspect.signature(type(criterion)).parameters
    assert "gather" in parameters
    assert not {"weight", "name", "type"} & parameters.keys()  # a sum's words
    said = repr(criterion)
    shown = re.findall(r"(\w+)=", criterion.extra_repr())
    assert set(shown) <= parameters.keys()
    assert type(criterion).__name__ in said
    for name in parameters:
        value = getattr(criterion, "enabled" if name == "terms" else name, None)
        assert isinstance(value, torch.nn.Module) or value is None or f"{name}={value!r}" in said


@every_case
def test_dicts_of_the_same_names_are_taken(case: Case) -> None:
    wanted, example = _run(_make(case)), _make(case)

    def said(features: Features) -> dict[str, object]:
        names = ("logits", "embedding", "intermediate", "index")
        return {name: getattr(features, name) for name in names}

    value = example.criterion(said(example.student), said(example.teacher), example.target)
    torch.testing.assert_close(value, wanted, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"student has no field 'embeding'.*embedding"):
        example.criterion({"embeding": torch.zeros(2, 2)}, {}, example.target)


@every_case
def test_copies_and_pickles(case: Case) -> None:
    wanted = _run(_make(case))
    for copied in (copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))):
        example = _make(case)
        value = _run(replace(example, criterion=copied(example.criterion)))
        torch.testing.assert_close(value, wanted, rtol=0, atol=0)


@on_the_cpu
def test_a_negative_weight_is_named(case: Case) -> None:
    with pytest.raises(ValueError, match="weight must be finite >= 0, got -1"):
        -1 * _make(case).criterion


@every_case
def test_double_inputs_to_a_float_criterion_are_named(case: Case) -> None:
    example = _make(case)
    example.criterion.float()
    if is_unshaped(example.criterion) or not list(example.criterion.parameters()):
        assert _run(example).dtype == torch.float64
        return
    with pytest.raises(TypeError, match=r"call criterion\.double\(\)"):
        _run(example)


@on_the_cpu
def test_no_number_is_read_and_no_shape_depends_on_one(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Either would wait for an accelerator, and is an error on torch's device without numbers."""
    example = case.make(0, max(5, case.min_batch))
    _run(example)  # a first call may look at what it was given
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # knows no such device
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    there = moved(example, "meta")
    student = _mapped(there.student, lambda value: value.requires_grad_())
    value = _run(replace(there, student=student))
    assert value.is_meta
    value.backward()
    assert any(leaf.grad is not None for leaf in _leaves(case, student))


@on_the_accelerator
def test_nothing_waits_for_the_accelerator(case: Case) -> None:
    example = _make(case)
    _run(example).backward()  # a first call may look at what it was given
    with no_wait(ACCELERATOR):
        _run(example).backward()


@on_the_cpu
def test_docstring_says_what_a_user_needs(case: Case) -> None:
    documentation = inspect.getdoc(type(case.make(0, 5).criterion)) or ""
    for section in ("Example:", "References:", "Raises:", "Shape:"):
        assert section in documentation


def test_every_public_criterion_has_a_case() -> None:
    covered = {type(case.make(0, 5).criterion).__name__ for case in CASES}
    assert {kind.__name__ for kind in PUBLIC} == covered


def test_case_names_are_unique() -> None:
    assert len(set(IDS)) == len(IDS)
