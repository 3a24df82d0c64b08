"""``papers surgery``: rules that keep distillation's gradient from harming the labels'."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from papers.__main__ import main
from papers.surgery import rule, ruled
from tests.examples.files import two_sides


def drawn(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(2))


def test_labels_first_takes_off_what_opposes_them_in_each_tensor_by_itself() -> None:
    task = [torch.tensor([2.0, 0.0]), torch.tensor([1.0, 1.0]), None]
    other = [torch.tensor([-3.0, 4.0]), torch.tensor([1.0, 0.0]), torch.tensor([5.0])]
    found = rule("first")(task, other)
    assert [part.tolist() for part in found] == [[2.0, 4.0], [2.0, 1.0], [5.0]]


def test_labels_first_looks_at_the_average_of_the_labels_gradient() -> None:
    combine, other = rule("first"), [torch.tensor([-1.0, -1.0])]
    combine([torch.tensor([1.0, 0.0])], [torch.zeros(2)])
    (found,) = combine([torch.tensor([0.0, 1.0])], other)
    # The average is along (0.9, 1), so that is the part taken off; what is left is at right angles.
    assert (found - torch.tensor([0.0, 1.0])).tolist() == pytest.approx(
        [-1 + 1.9 / 1.81 * 0.9, -1 + 1.9 / 1.81]
    )


@given(st.integers(0, 10_000))
def test_what_does_not_oppose_the_labels_is_left_to_the_last_bit(seed: int) -> None:
    task, other = drawn(seed)
    other = other if task @ other >= 0 else -other
    assert torch.equal(rule("first")([task], [other])[0], task + other)


@given(st.integers(0, 10_000))
def test_the_labels_loss_falls_along_the_first_step_whatever_opposes_it(seed: int) -> None:
    task, other = drawn(seed)
    (step,) = rule("first")([task], [100 * other])
    assert task @ step >= (task @ task) * (1 - 1e-9)


@given(st.integers(0, 10_000), st.sampled_from([0.5, 1.0, 3.0]))
def test_a_bound_shortens_what_is_longer_and_leaves_the_rest(seed: int, bound: float) -> None:
    task, other = drawn(seed)
    (long,), (short,) = (
        rule(f"bound:{bound}")([task], [other * bound * size * task.norm() / other.norm()])
        for size in (9.0, 0.5)
    )
    assert (long - task).norm() == pytest.approx(float(bound * task.norm()))
    assert (short - task).norm() == pytest.approx(float(0.5 * bound * task.norm()))


@pytest.mark.parametrize("text", ["plain", "first", "bound:1"])
def test_a_parameter_gets_the_gradient_that_the_rule_gives(text: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2).double(), torch.randn(4, 3, dtype=torch.float64)

    def loss(model: nn.Module, batch: Tensor, share: float) -> tuple[Tensor, dict[str, Tensor]]:
        y = model(batch)
        return y, {"CE": (y**2).mean(), "KD": share * (y - 3).abs().mean()}

    _, terms = ruled(loss, rule(text))(model, x, 2.0)
    sum(terms.values()).backward()
    found = [parameter.grad for parameter in model.parameters()]
    plain = loss(model, x, 2.0)[1]
    parts = [
        torch.autograd.grad(term, list(model.parameters()), retain_graph=True)
        for term in plain.values()
    ]
    expected = rule(text)(*map(list, parts))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert {name: float(term.detach()) for name, term in terms.items()} == {
        name: float(term.detach()) for name, term in plain.items()
    }


@pytest.mark.parametrize("text", ["upgrad", "mgda"])
def test_torchjds_rules_are_sums_of_what_its_aggregators_average(text: str) -> None:
    pytest.importorskip("torchjd")
    task, other = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    found = rule(text)([task, torch.tensor([3.0])], [other, None])
    assert found[0].tolist() == pytest.approx([1.0, 1.0], abs=1e-3)
    assert found[1].tolist() == [3.0]


@pytest.mark.parametrize(
    ("text", "told"),
    [("firts", "did you mean 'first'"), ("bound", "positive factor"), ("bound:0", "bound:2")],
)
def test_an_unknown_rule_is_one_line(text: str, told: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["surgery", "mnist", "--rules", text]) == 2
    assert told in capsys.readouterr().err


def test_each_criterion_is_trained_by_each_rule_and_the_lone_student_once(tmp_path: Path) -> None:
    rich, poor = two_sides(tmp_path / "data", count=10)
    out = tmp_path / "out"
    arguments = [
        *("surgery", "pairs", "--rich", str(rich), "--poor", str(poor), "--out", str(out)),
        *("--size", "16", "--pad", "2", "--epochs", "1", "--seeds", "0", "--batch-size", "8"),
        *("--teacher", "resnet8x0_5", "--student", "resnet8x0_5", "--device", "cpu"),
        *("--criterion", "alone", "kd", "--rules", "plain", "first", "bound:0.5"),
    ]
    assert main(arguments) == 0
    runs = json.loads((out / "results.json").read_text())["runs"]
    assert [run["method"] for run in runs] == ["alone", "kd", "kd, first", "kd, bound:0.5"]
    assert len({json.dumps(run["config"]["loss"]) for run in runs}) == 4
    assert "kd, first" in (out / "surgery.md").read_text()
