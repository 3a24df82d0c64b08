"""What the shared contract does not say of semantic-aware alignment."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from structkd import CORALLoss
from structkd.criteria.alignment import SemanticAlignmentLoss
from structkd.transport import LagrangianPlanner


def _maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _criterion(**options) -> SemanticAlignmentLoss:
    torch.manual_seed(0)
    return SemanticAlignmentLoss(**{"heads": 2, **options})


def test_embedding_term_is_coral_of_the_pooled_maps() -> None:
    map_s, map_t = _maps(5, 4, 3, 2), _maps(5, 4, 3, 2, seed=1)
    found = _criterion().terms(map_s, map_t)
    assert list(found) == ["SKA-tokens", "SKA-embeddings"]
    wanted = CORALLoss()(map_s.mean(dim=(2, 3)), map_t.mean(dim=(2, 3)))
    torch.testing.assert_close(found["SKA-embeddings"], wanted)


def test_a_planner_with_another_epsilon_is_used() -> None:
    map_s, map_t = _maps(5, 4, 3, 2), _maps(5, 4, 3, 2, seed=1)
    same = LagrangianPlanner(2**0.5, gradient="unrolled")
    other = LagrangianPlanner(0.1, gradient="unrolled")
    found = []
    for planner in (None, same, other):
        criterion = _criterion(planner=planner)  # which seeds what the first call draws
        found.append(criterion(map_s, map_t))
    torch.testing.assert_close(found[0], found[1])
    assert not torch.isclose(found[0], found[2])


def test_published_scale_is_the_standard_one_times_batch_and_width() -> None:
    map_s, map_t = _maps(5, 4, 3, 2), _maps(5, 4, 3, 2, seed=1)
    found = []
    for scale in ("standard", "published"):
        found.append(_criterion(scale=scale).terms(map_s, map_t))
    standard, published = found
    for name, width in (("SKA-tokens", 24), ("SKA-embeddings", 4)):
        torch.testing.assert_close(published[name], standard[name] * 4**2 / width)


def test_queries_keys_and_adapter_learn() -> None:
    criterion = _criterion()
    criterion(_maps(5, 3, 2, 2), _maps(5, 4, 2, 2, seed=1)).backward()
    for name, parameter in criterion.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(("channels", "heads"), [(16, 8), (12, 6), (7, 7), (11, 1)])
def test_heads_and_epsilon_follow_the_teacher(channels: int, heads: int) -> None:
    map_s, map_t = _maps(4, channels, 2, 2), _maps(4, channels, 2, 2, seed=1)
    planner = LagrangianPlanner((channels / heads) ** 0.5, gradient="unrolled")
    found = []
    for options in ({"heads": None}, {"heads": heads, "planner": planner}):
        found.append(_criterion(**options)(map_s, map_t))
    torch.testing.assert_close(*found)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_equal_tokens_share_the_mass_whatever_was_learned(seed: int) -> None:
    rows_s, rows_t = _maps(5, 4, seed=seed), _maps(5, 4, seed=seed + 1)
    maps = [rows[:, :, None, None].expand(-1, -1, 3, 2) for rows in (rows_s, rows_t)]
    found = SemanticAlignmentLoss().terms(*maps)
    torch.testing.assert_close(found["SKA-embeddings"], CORALLoss()(rows_s, rows_t))
    repeated = CORALLoss()(rows_s.repeat(1, 6), rows_t.repeat(1, 6))
    torch.testing.assert_close(found["SKA-tokens"], repeated)


def test_a_module_of_ones_own_adapts() -> None:
    own = nn.Conv2d(3, 4, 1).double()
    criterion = _criterion(adapter=own)
    criterion(_maps(5, 3, 2, 2), _maps(5, 4, 2, 2)).backward()
    assert own.weight.grad.abs().max() > 0
    with pytest.raises(ValueError, match="adapter must bring"):
        _criterion(adapter=nn.Identity())(_maps(5, 3, 2, 2), _maps(5, 4, 2, 2))


def test_wide_tokens_need_no_square_matrix() -> None:
    # d = 25,088: the direct form's two covariances would take 5 GB.
    criterion = SemanticAlignmentLoss()
    map_s = torch.randn(4, 512, 7, 7, requires_grad=True)
    criterion(map_s, torch.randn(4, 512, 7, 7)).backward()
    assert map_s.grad.isfinite().all()


def test_tokens_that_cancel_out_stay_finite() -> None:
    maps = torch.zeros(4, 4, 2, 2, requires_grad=True)
    value = SemanticAlignmentLoss(heads=2)(maps, torch.randn(4, 4, 2, 2))
    value.backward()
    assert value.isfinite()
    assert maps.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"heads": 3}, ValueError, r"heads=3 must divide the teacher's 8 channels"),
        ({"heads": 0}, ValueError, r"heads must be at least 1"),
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
    with pytest.raises(error, match=message):
        SemanticAlignmentLoss(**options)(torch.randn(4, 8, 2, 2), torch.randn(4, 8, 2, 2))
