"""What the adversarial criteria promise beyond the shared contract: who learns what."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from structkd import Features
from tests.cases.adversarial import afkd, afkd_terms, alkd, alkd_terms
from tests.cases.case import Example

GAMES = {
    "alkd": (alkd, alkd_terms, "logits", "ALKD"),
    "afkd-embedding": (afkd(), afkd_terms, "embedding", "AFKD"),
    "afkd-map": (afkd("intermediate"), afkd_terms, "intermediate", "AFKD"),
}
every_game = pytest.mark.parametrize("game", GAMES)


def _leaf(example: Example, field: str) -> tuple[Example, torch.Tensor]:
    value = getattr(example.student, field)
    value = (value[0] if field == "intermediate" else value).clone().requires_grad_()
    return replace(example, student=Features(**{field: value})), value


@every_game
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**16), batch=st.integers(1, 4))
def test_gradients_of_both_players_equal_the_definition(game: str, seed: int, batch: int) -> None:
    make, terms, field, _ = GAMES[game]
    ours, leaf = _leaf(make(seed, batch), field)
    ours.criterion(ours.student, ours.teacher, ours.target).backward()
    wanted, wanted_leaf = _leaf(make(seed, batch), field)
    sum(terms(wanted).values()).backward()
    torch.testing.assert_close(leaf.grad, wanted_leaf.grad, rtol=1e-7, atol=1e-9)
    pairs = zip(ours.criterion.parameters(), wanted.criterion.parameters(), strict=True)
    for got, want in pairs:
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-7, atol=1e-9)


@every_game
def test_each_term_reaches_its_own_player_only(game: str) -> None:
    make, _, field, name = GAMES[game]
    example, leaf = _leaf(make(1, 4), field)
    terms = example.criterion.terms(example.student, example.teacher, example.target)
    discriminator = list(example.criterion.discriminator.parameters())
    for term, value in terms.items():
        grads = torch.autograd.grad(
            value, [leaf, *discriminator], allow_unused=True, retain_graph=True
        )
        if term == f"{name}-discriminator":
            assert grads[0] is None
            assert all(grad is not None for grad in grads[1:])
        else:
            assert grads[0] is not None
            assert all(grad is None for grad in grads[1:])


@every_game
def test_student_and_discriminator_pull_against_each_other(game: str) -> None:
    make, _, field, name = GAMES[game]
    example, leaf = _leaf(make(4, 5), field)

    def terms():
        return example.criterion.terms(example.student, example.teacher, example.target)

    (fool,) = torch.autograd.grad(terms()[f"{name}-adversarial"], leaf)
    with torch.no_grad():
        before = terms()
        leaf -= 1e-4 * fool / fool.norm()
        after = terms()
    assert after[f"{name}-adversarial"] < before[f"{name}-adversarial"]
    # What fools it more is told apart less well (its label part aside).
    if name == "AFKD":
        assert after["AFKD-discriminator"] > before["AFKD-discriminator"]


@every_game
def test_every_parameter_learns_under_an_optimizer_and_is_saved(game: str) -> None:
    make, _, field, _ = GAMES[game]
    example, _ = _leaf(make(2, 5), field)
    criterion = example.criterion
    optimizer = torch.optim.SGD(criterion.parameters(), lr=0.1)
    before = {name: value.clone() for name, value in criterion.state_dict().items()}
    assert {name for name, _ in criterion.named_parameters()} == set(before)
    criterion(example.student, example.teacher, example.target).backward()
    optimizer.step()
    assert all((value != before[name]).any() for name, value in criterion.state_dict().items())
