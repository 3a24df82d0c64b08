"""What the shared contract does not say of semantic-aware alignment."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from structkd import CORALLoss, Features
from structkd.criteria.alignment import SemanticAlignmentLoss
from structkd.transport import LagrangianPlanner


def _maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _criterion(*args, **options) -> SemanticAlignmentLoss:
    torch.manual_seed(0)
    return SemanticAlignmentLoss(*args, **options).double()


def test_embedding_term_is_coral_of_the_pooled_maps() -> None:
    map_s, map_t = _maps(5, 4, 3, 2), _maps(5, 4, 3, 2, seed=1)
    found = _criterion(4, 4, heads=2).terms(map_s, map_t)
    assert list(found) == ["SKA-tokens", "SKA-embeddings"]
    wanted = CORALLoss()(map_s.mean(dim=(2, 3)), map_t.mean(dim=(2, 3)))
    torch.testing.assert_close(found["SKA-embeddings"], wanted)


def test_even_plans_leave_tokens_as_they_are() -> None:
    map_s, map_t = _maps(5, 4, 3, 2), _maps(5, 4, 3, 2, seed=1)
    wanted = CORALLoss()(
        map_s.flatten(2).transpose(1, 2).flatten(1), map_t.flatten(2).transpose(1, 2).flatten(1)
    )
    even = _criterion(4, 4, heads=2)
    for scores in (even.scores_s, even.scores_t):
        nn.init.zeros_(scores.weight)
    torch.testing.assert_close(even.terms(map_s, map_t)["SKA-tokens"], wanted)


def test_a_planner_with_another_epsilon_is_used() -> None:
    map_s, map_t = _maps(5, 4, 3, 2), _maps(5, 4, 3, 2, seed=1)
    same = LagrangianPlanner(2**0.5, gradient="unrolled")
    other = LagrangianPlanner(0.1, gradient="unrolled")
    default = _criterion(4, 4, heads=2)(map_s, map_t)
    torch.testing.assert_close(_criterion(4, 4, heads=2, planner=same)(map_s, map_t), default)
    assert not torch.isclose(_criterion(4, 4, heads=2, planner=other)(map_s, map_t), default)


def test_published_scale_is_the_standard_one_times_batch_and_width() -> None:
    map_s, map_t = _maps(5, 4, 3, 2), _maps(5, 4, 3, 2, seed=1)
    standard = _criterion(4, 4, heads=2).terms(map_s, map_t)
    published = _criterion(4, 4, heads=2, scale="published").terms(map_s, map_t)
    for name, width in (("SKA-tokens", 24), ("SKA-embeddings", 4)):
        torch.testing.assert_close(published[name], standard[name] * 4**2 / width)


def test_queries_keys_and_adapter_learn() -> None:
    criterion = _criterion(3, 4, heads=2)
    criterion(_maps(5, 3, 2, 2), _maps(5, 4, 2, 2, seed=1)).backward()
    for name, parameter in criterion.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_from_features_reads_channels_and_options() -> None:
    feats_s = Features(intermediate=(_maps(4, 2, 4, 4), _maps(4, 3, 2, 2)))
    feats_t = Features(intermediate=(_maps(4, 8, 4, 4), _maps(4, 4, 2, 2)))
    last = SemanticAlignmentLoss.from_features(feats_s, feats_t, heads=2).double()
    assert (last.adapter.in_channels, last.adapter.out_channels) == (3, 4)
    first = SemanticAlignmentLoss.from_features(feats_s, feats_t, heads=4, layer=0).double()
    assert (first.adapter.in_channels, first.adapter.out_channels) == (2, 8)
    assert first(feats_s, feats_t).isfinite()


def test_wide_tokens_need_no_square_matrix() -> None:
    # d = 25,088: the direct form's two covariances would take 5 GB.
    criterion = SemanticAlignmentLoss(512, 512)
    map_s = torch.randn(4, 512, 7, 7, requires_grad=True)
    criterion(map_s, torch.randn(4, 512, 7, 7)).backward()
    assert map_s.grad.isfinite().all()


def test_tokens_that_cancel_out_stay_finite() -> None:
    maps = torch.zeros(4, 4, 2, 2, requires_grad=True)
    value = SemanticAlignmentLoss(4, 4, heads=2)(maps, torch.randn(4, 4, 2, 2))
    value.backward()
    assert value.isfinite()
    assert maps.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"heads": 3}, ValueError, r"heads=3 must divide teacher_channels=8"),
        ({"heads": 0}, ValueError, r"heads must be at least 1"),
        ({"student_channels": 0}, ValueError, r"student_channels must be at least 1"),
        ({"scale": "paper"}, ValueError, r"scale must be one of standard, published"),
        ({"form": "dense"}, ValueError, r"form must be one of auto, matrix, gram"),
        ({"planner": 0.5}, TypeError, r"planner must be a LagrangianPlanner, got float"),
        (
            {"planner": LagrangianPlanner(1.0)},
            ValueError,
            r"planner must have gradient='unrolled'.*'envelope'",
        ),
        (
            {"planner": LagrangianPlanner(1.0, "capacity", gradient="unrolled")},
            ValueError,
            r"constraint 'rows', got 'capacity'",
        ),
        (
            {"planner": LagrangianPlanner(1.0, "both", gradient="unrolled")},
            ValueError,
            r"constraint 'rows', got 'both': .* queries and keys learn nothing",
        ),
    ],
)
def test_bad_options_are_named(options: dict, error: type[Exception], message: str) -> None:
    given = {"student_channels": 8, "teacher_channels": 8, "heads": 2, **options}
    with pytest.raises(error, match=message):
        SemanticAlignmentLoss(**given)


@pytest.mark.parametrize(
    ("shape_s", "shape_t", "message"),
    [
        ((4, 5, 4), (4, 6, 4), r"whose 5 tokens form no square.* reshape the patches"),
        ((4, 4, 2, 2), (4, 8, 2, 2), r"built for a teacher of 4 channels.*from_features"),
        ((4, 8, 2, 2), (4, 4, 2, 2), r"built for a teacher of 4 channels"),
    ],
)
def test_maps_that_do_not_fit_are_named(shape_s: tuple, shape_t: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _criterion(4, 4, heads=2)(_maps(*shape_s), _maps(*shape_t))
