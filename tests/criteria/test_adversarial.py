"""What the adversarial criteria promise beyond the shared contract: who learns what."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from structkd import Features
from structkd.criteria.adversarial import AdversarialFeatureLoss, AdversarialLogitsLoss
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


def test_student_gradient_does_not_vanish_where_the_discriminator_wins() -> None:
    criterion = AdversarialFeatureLoss(blocks=0, hidden_dim=2)
    student = torch.ones(1, 2, requires_grad=True)
    weights = {"stem.weight": torch.eye(2), "head.weight": torch.tensor([[-30.0, -30.0]])}
    biases = {"stem.bias": torch.zeros(2), "head.bias": torch.zeros(1)}
    criterion.discriminator.load_state_dict({**weights, **biases})  # gives them their shape
    criterion(student, torch.zeros(1, 2)).backward()
    # D(s) = -60: sigmoid(-60) of the saturating loss would leave 1e-26 of this.
    torch.testing.assert_close(student.grad, torch.full((1, 2), 30.0))


@pytest.mark.parametrize("kind", ["alkd", "afkd"])
def test_one_optimizer_trains_the_game(kind: str) -> None:
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 6, generator=rng)
    teacher = 2 + torch.randn(64, 5, generator=rng)
    target = torch.randint(0, 5, (64,), generator=rng)
    if kind == "alkd":
        criterion = AdversarialLogitsLoss(hidden_dim=16, l1_weight=0.0)
    else:
        criterion = AdversarialFeatureLoss(hidden_dim=16)
    net = nn.Linear(6, 5)
    adversarial, own = (f"{kind.upper()}-{part}" for part in ("adversarial", "discriminator"))

    # A student that stands still: the discriminator learns to tell it apart.
    still = torch.optim.Adam(criterion.parameters(), lr=0.02)  # before the heads have a shape
    rows = net(inputs).detach()
    first = criterion.terms(rows, teacher, target)
    for _ in range(60):
        still.zero_grad()
        criterion(rows, teacher, target).backward()
        still.step()
    beaten = criterion.terms(rows, teacher, target)
    assert beaten[own] < 0.7 * first[own]
    assert beaten[adversarial] > first[adversarial]

    # A student that plays: it fools the discriminator again, one backward a step.
    distance = lambda: (net(inputs).mean(0) - teacher.mean(0)).norm()  # noqa: E731
    apart = distance()
    both = torch.optim.Adam([*net.parameters(), *criterion.parameters()], lr=0.02)
    for _ in range(200):
        both.zero_grad()
        criterion(net(inputs), teacher, target).backward()
        both.step()
    assert criterion.terms(net(inputs), teacher, target)[adversarial] < beaten[adversarial]
    assert distance() < 0.6 * apart


def test_adapter_only_where_widths_differ() -> None:
    teacher = torch.zeros(2, 6)
    for width, parameters in ((4, ["net.0.weight", "net.0.bias"]), (6, [])):
        criterion = AdversarialFeatureLoss()
        criterion(torch.zeros(2, width), teacher)
        assert [name for name, _ in criterion.adapter.named_parameters()] == parameters
    own = nn.Linear(4, 6)
    assert AdversarialFeatureLoss(adapter=own).adapter is own


def test_alkd_l1_is_the_norm_of_a_row() -> None:
    target = torch.zeros(4, dtype=torch.int64)
    terms = AdversarialLogitsLoss().terms(torch.zeros(4, 3), torch.full((4, 3), 2.0), target)
    assert float(terms["ALKD-l1"]) == 6.0


def test_bad_input_is_named() -> None:
    logits, target = torch.zeros(2, 3), torch.tensor([0, 1])
    criterion = AdversarialLogitsLoss()
    with pytest.raises(ValueError, match="AdversarialLogitsLoss needs target"):
        criterion(logits, logits)
    with pytest.raises(ValueError, match=r"target must lie in 0\.\.2 \(or be -100"):
        criterion(logits, logits, torch.tensor([0, -1]))
    with pytest.raises(ValueError, match="logits must have one width, got 3 and 4"):
        criterion(logits, torch.zeros(2, 4), target)
    criterion(logits, logits, target)
    feature = AdversarialFeatureLoss()
    feature(logits, logits)
    wide = torch.zeros(2, 4)
    for met, more in ((criterion, (target,)), (feature, ())):
        with pytest.raises(ValueError, match=r"rows of 3 numbers.* got 4: make a new criterion"):
            met(wide, wide, *more)
    deep = AdversarialFeatureLoss(source="intermediate", layer=2)
    with pytest.raises(ValueError, match=r"layer=2, but student\.intermediate holds 1 map"):
        deep(torch.zeros(2, 3, 2, 2), torch.zeros(2, 3, 2, 2))


@pytest.mark.parametrize("kind", [AdversarialLogitsLoss, AdversarialFeatureLoss])
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"hidden_dim": 0}, "hidden_dim must be at least 1"),
        ({"blocks": -1}, "blocks must be at least 0"),
        ({"adversarial_weight": -1}, "adversarial_weight must be finite >= 0"),
    ],
)
def test_bad_arguments_are_named(kind, options, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        kind(**options)


def test_bad_options_of_one_are_named() -> None:
    with pytest.raises(ValueError, match="l1_weight must be finite >= 0"):
        AdversarialLogitsLoss(l1_weight=-1)
    with pytest.raises(ValueError, match="one of embedding, intermediate, got 'logits'"):
        AdversarialFeatureLoss(source="logits")


@pytest.mark.parametrize("labelled", [[0, 2, 3], []], ids=len)
def test_only_the_parts_that_read_labels_leave_rows_out(labelled: list[int]) -> None:
    torch.manual_seed(0)
    criterion = AdversarialLogitsLoss()
    student, teacher = torch.randn(2, 5, 3)
    student.requires_grad_()
    target = torch.tensor([0, 1, 2, 0, 1])
    some = torch.full((5,), -100)
    some[labelled] = target[labelled]
    full, got = (criterion.terms(student, teacher, labels) for labels in (target, some))
    for name in ("ALKD-l1", "ALKD-adversarial"):
        torch.testing.assert_close(got[name], full[name])
    own = lambda logits: criterion.discriminator(logits, 4)  # noqa: E731
    told = nn.functional.softplus(-own(teacher)[:, 0]) + nn.functional.softplus(own(student)[:, 0])
    want, cross_entropy = told.mean(), nn.functional.cross_entropy
    if labelled:
        for logits in (student, teacher):
            want = want + cross_entropy(own(logits[labelled])[:, 1:], target[labelled])
        label = cross_entropy(own(student[labelled])[:, 1:], target[labelled])
    else:
        label = torch.zeros(())
    torch.testing.assert_close(got["ALKD-discriminator"], want)
    torch.testing.assert_close(got["ALKD-label"], label)
    assert torch.autograd.grad(sum(got.values()), student)[0].isfinite().all()
