"""What the shared contract does not say of semantic-aware alignment."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from structkd import CORALLoss, Features
from structkd.criteria.alignment import SemanticAlignmentLoss
from structkd.transport import LagrangianPlanner
from tests.cases.case import generator, normal, shaped


def _maps(*shape: int, seed: int = 0) -> Tensor:
    return normal(generator(seed), *shape)


MAP_S, MAP_T = _maps(5, 4, 3, 2), _maps(5, 4, 3, 2, seed=1)


def _criterion(**options) -> SemanticAlignmentLoss:
    torch.manual_seed(0)
    return SemanticAlignmentLoss(heads=2, **options)


def _rows(features: Tensor) -> Tensor:
    return features.flatten(2).transpose(1, 2).flatten(1)


def test_embedding_term_is_coral_of_the_pooled_maps() -> None:
    found = _criterion().terms(MAP_S, MAP_T)
    assert list(found) == ["SKA-tokens", "SKA-embeddings"]
    wanted = CORALLoss()(MAP_S.mean(dim=(2, 3)), MAP_T.mean(dim=(2, 3)))
    torch.testing.assert_close(found["SKA-embeddings"], wanted)


def test_even_plans_leave_tokens_as_they_are() -> None:
    even = shaped(_criterion(), Features(intermediate=MAP_S), Features(intermediate=MAP_T))
    for parameter in even.parameters():
        nn.init.zeros_(parameter)
    wanted = CORALLoss()(_rows(MAP_S), _rows(MAP_T))
    torch.testing.assert_close(even.terms(MAP_S, MAP_T)["SKA-tokens"], wanted)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16), heads=st.sampled_from([1, 2, 4]))
def test_equal_tokens_cost_nothing_once_scores_are_equal(seed: int, heads: int) -> None:
    tokens = _maps(4, 5, 4, seed=seed)
    feats = Features(intermediate=tokens)
    criterion = shaped(SemanticAlignmentLoss(heads=heads), feats, feats)
    assert criterion.terms(tokens, tokens)["SKA-tokens"] > 0  # the plans differ
    criterion.scores_t.load_state_dict(criterion.scores_s.state_dict())
    assert criterion(tokens, tokens) < 1e-20


def test_a_planner_with_another_epsilon_is_used() -> None:
    def value(**options) -> Tensor:
        return _criterion(**options)(MAP_S, MAP_T)

    same = LagrangianPlanner(2**0.5, gradient="unrolled")
    torch.testing.assert_close(value(planner=same), value())
    other = LagrangianPlanner(0.1, gradient="unrolled")
    assert not torch.isclose(value(planner=other), value())


def test_published_scale_is_the_standard_one_times_batch_and_width() -> None:
    standard = _criterion().terms(MAP_S, MAP_T)
    published = _criterion(scale="published").terms(MAP_S, MAP_T)
    for name, width in (("SKA-tokens", 24), ("SKA-embeddings", 4)):
        torch.testing.assert_close(published[name], standard[name] * 4**2 / width)


def test_queries_keys_and_adapter_learn() -> None:
    criterion = _criterion()
    criterion(_maps(5, 3, 2, 2), _maps(5, 4, 2, 2, seed=1)).backward()
    assert len(list(criterion.parameters())) == 4
    for name, parameter in criterion.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_the_largest_divisor_up_to_8_is_the_number_of_heads() -> None:
    student, teacher = _maps(5, 3, 2, 2), _maps(5, 6, 2, 2, seed=1)
    values = []
    for heads in (None, 6):
        torch.manual_seed(0)
        values.append(SemanticAlignmentLoss(heads=heads)(student, teacher))
    assert torch.equal(*values)


def test_wide_tokens_need_no_square_matrix() -> None:
    # d = 25,088: the direct form's two covariances would take 5 GB.
    map_s = torch.randn(4, 512, 7, 7, requires_grad=True)
    SemanticAlignmentLoss()(map_s, torch.randn(4, 512, 7, 7)).backward()
    assert map_s.grad.isfinite().all()


def test_tokens_that_cancel_out_stay_finite() -> None:
    maps = torch.zeros(4, 4, 2, 2, requires_grad=True)
    value = _criterion()(maps, torch.randn(4, 4, 2, 2))
    value.backward()
    assert value.isfinite()
    assert maps.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"heads": 0}, ValueError, r"heads must be at least 1"),
        ({"scale": "paper"}, ValueError, r"scale must be one of standard, published"),
        ({"form": "dense"}, ValueError, r"form must be one of auto, matrix, gram"),
        ({"planner": 0.5}, TypeError, r"planner must be a LagrangianPlanner, got float"),
        (
            {"planner": LagrangianPlanner(1.0)},
            ValueError,
            r"planner must have gradient='unrolled'.*'envelope'",
        ),
        *(
            (
                {"planner": LagrangianPlanner(1.0, constraint, gradient="unrolled")},
                ValueError,
                rf"constraint 'rows', got '{constraint}': .* queries and keys learn nothing",
            )
            for constraint in ("capacity", "both")
        ),
    ],
)
def test_bad_options_are_named(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SemanticAlignmentLoss(**options)


@pytest.mark.parametrize(
    ("shape_s", "shape_t", "message"),
    [
        ((4, 5, 6), (4, 6, 4), r"5 tokens form no square.* reshape the patches"),
        ((4, 6, 2, 2), (4, 8, 2, 2), r"to the teacher's 8 channels, got float64 \(4, 4, 2, 2\)"),
        ((4, 8, 2, 2), (4, 4, 2, 2), r"took its shape from 6 channels"),
        ((4, 6, 2, 2), (4, 3, 2, 2), r"heads=2 must divide the teacher's 3 channels"),
    ],
)
def test_maps_that_do_not_fit_are_named(shape_s: tuple, shape_t: tuple, message: str) -> None:
    criterion = _criterion()
    if "heads" not in message:
        criterion(_maps(4, 6, 2, 2), _maps(4, 4, 2, 2))
    with pytest.raises(ValueError, match=message):
        criterion(_maps(*shape_s), _maps(*shape_t))
