"""Rows by the library's specs: names, classes, dicts, lists, files, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import train as script
from structkd import DSLoss, Features, KDLoss
from tests.examples.entries import results
from tests.reference import dskd

Runner = Callable[..., int]
Shown = pytest.CaptureFixture[str]
DATA = {"samples": 80, "batch_size": 6, "negatives": 16}
OWN = """
import torch.nn.functional as F
import structkd

FACTOR = 1.0

class Mean(structkd.Criterion):
    reads = ("logits",)

    def compute(self, student, teacher, target):
        return {"Mean": FACTOR * F.mse_loss(student.logits, teacher.logits)}
"""


def features(width: int, stages: int = 3) -> Features:
    generator = torch.Generator().manual_seed(width)
    widths = [width * 2**stage for stage in range(stages)]
    maps = tuple(torch.randn(6, w, 4, 4, generator=generator) for w in widths)
    return Features(
        logits=torch.randn(6, 5, generator=generator),
        embedding=torch.randn(6, widths[-1], generator=generator),
        intermediate=maps,
        index=torch.arange(6),
    )


def value(text: str, stages: int = 1) -> torch.Tensor:
    torch.manual_seed(0)
    criterion = script.Method.of(text).build(stages, DATA)
    return criterion(features(8, stages), features(16, stages))


# What a spec means.


def test_a_name_has_the_weights_of_its_source_and_a_sum_leaves_the_labels_at_one() -> None:
    student, teacher = features(8, 1), features(16, 1)
    kd = script.Method.of("kd")
    assert kd.labels == 0.1
    expected = 0.9 * KDLoss(temperature=4.0)(student, teacher)
    torch.testing.assert_close(value("kd"), expected)
    both = script.Method.of("[kd, ds]")
    assert both.labels == 1.0
    torch.manual_seed(0)
    ds = DSLoss()(student, teacher)
    torch.testing.assert_close(value("[kd, ds]"), expected + ds)
    own = script.Method.of("[{type: SupervisionLoss, weight: 0.5}, kd]")
    assert own.labels == 0.5
    torch.testing.assert_close(value("[{type: SupervisionLoss, weight: 0.5}, kd]"), expected)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("KDLoss", "{type: KDLoss}"),
        ("kd", " KD "),
        (
            "{type: KDLoss, temperature: 2, weight: 0.5}",
            "[{type: KDLoss, temperature: 2, weight: 0.5}]",
        ),
        ("[kd, [ds, vid]]", "[kd, ds, vid]"),
    ],
)
def test_specs_that_say_the_same(text: str, same: str) -> None:
    assert torch.equal(value(text), value(same))
    assert script.Method.of(text).described == script.Method.of(same).described


def test_a_description_changes_with_every_option() -> None:
    texts = ["kd", "KDLoss", "{type: KDLoss, temperature: 3}", "{type: KDLoss, weight: 0.5}", "ds",
             "{type: DSLoss, gamma: 1}", "fitnets", "fitnets_all", "[kd, ds]",
             "[{type: SupervisionLoss, weight: 0}, kd]"]  # fmt: skip
    found = [script.Method.of(text).described for text in texts]
    assert all(found[i] != other for i in range(len(found)) for other in found[:i])


def test_the_printed_form_is_the_papers_equations_in_plain_loops() -> None:
    method = script.Method.of("ds_printed")
    assert method.labels == 1.0  # Eq. 12: L_CE + gamma (L_SEM + L_DCM)
    torch.manual_seed(0)
    criterion = method.build(1, DATA)
    student = Features(embedding=torch.randn(6, 2), intermediate=torch.randn(6, 2, 2, 2))
    teacher = Features(embedding=torch.randn(6, 3), intermediate=torch.randn(6, 4, 2, 2))
    criterion(student, teacher)  # takes its shape
    criterion.double()
    sem = criterion.sem

    def wide(one: Features) -> Features:
        maps = one.intermediate[0].double().requires_grad_()
        return Features(embedding=one.embedding.double().requires_grad_(), intermediate=maps)

    student, teacher = wide(student), wide(teacher)
    got = criterion.terms(student, teacher)
    mlps = [sem.student_projector, sem.teacher_projector]
    z_s, z_t = (
        dskd.projected(one.embedding, [value for _, value in mlp.named_parameters()])
        for one, mlp in zip((student, teacher), mlps, strict=True)
    )
    assert z_s.shape == z_t.shape == (6, 12)  # d is four times the teacher's width
    conv = criterion.dcm.adapter.conv
    rows = dskd.mean_over_positions(student.intermediate[0]) @ conv.weight[:, :, 0, 0].T
    rows_s = dskd.unit_rows(rows + conv.bias)
    rows_t = dskd.unit_rows(dskd.mean_over_positions(teacher.intermediate[0]))
    sem_1, sem_2 = dskd.sem_terms(z_s, z_t)
    (gamma,) = set(criterion.gamma)  # one for both
    want = {
        "SEM-1": gamma * sem_1,
        "SEM-2": gamma * sem_2,
        "DCM-1": gamma * dskd.mean_rbf(rows_s, rows_s, 0.5**0.5),
        "DCM-2": gamma * dskd.mean_rbf(rows_s, rows_t, 0.5**0.5),
    }
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value)
    # Eq. 12 minimises over f and g of the student alone.
    assert not any(p.requires_grad for p in sem.teacher_projector.parameters())
    assert all(p.requires_grad for p in sem.student_projector.parameters())
    inputs = [student.embedding, student.intermediate[0], *sem.student_projector.parameters()]
    found = torch.autograd.grad(sum(got.values()), inputs)
    for one, other in zip(found, torch.autograd.grad(sum(want.values()), inputs), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", [name for name in script.METHODS if name != "alone"])
def test_every_name_is_built_reads_what_it_asks_for_and_reaches_the_student(name: str) -> None:
    method = script.Method.of(name)
    stages = len(method.stages(["a", "b", "c"]))
    student, teacher = features(8, stages), features(16, stages)
    for part in (student.logits, student.embedding, *student.intermediate):
        part.requires_grad_()
    target = torch.arange(6) % 5
    criterion = method.build(stages, DATA)
    criterion(student, teacher, target)
    criterion(student, teacher, target).backward()
    parts = (student.logits, student.embedding, *student.intermediate)
    assert any(part.grad is not None and part.grad.any() for part in parts)
    if stages == 3 and name not in ("fitnets", "ska"):  # these count their one from the end
        assert all(part.grad is not None and part.grad.any() for part in student.intermediate)


def test_which_stages_are_captured() -> None:
    names = ["a", "b", "c"]
    found = {
        text: script.Method.of(text).stages(names) for text in ("kd", "ds", "vid", "[ds, nst]")
    }
    assert found == {"kd": ["b"], "ds": ["b"], "vid": names, "[ds, nst]": names}
    assert script.Method.of("ds").stages(["a"]) == ["a"]
    # In a sum that has all stages, a criterion of one map still reads the last but one.
    maps = [features(width) for width in (8, 16)]
    criterion = script.Method.of("[ds, nst]").build(3, DATA)
    for part in maps[0].intermediate:
        part.requires_grad_()
    torch.stack(
        [v for k, v in criterion.terms(*maps).items() if k.startswith("DCM")]
    ).sum().backward()
    grads = [part.grad is not None and bool(part.grad.any()) for part in maps[0].intermediate]
    assert grads == [False, True, False]


# Rows that train.


def test_every_name_trains_a_few_steps(run: Runner, tmp_path: Path) -> None:
    names = list(script.METHODS)
    options = ("--epochs", "1", "--limit", "32", "--lr", "0.001", "--memory", "1")
    assert run(*options, "--criterion", *names) == 0
    runs = results(tmp_path / "out")
    assert [found["method"] for found in runs] == names
    for found in runs:
        assert found["loss"] == pytest.approx(sum(found["terms"].values()), rel=1e-4)
        assert len(found["terms"]) > (found["method"] != "alone")


def test_a_file_of_ones_own_is_a_row_and_its_change_is_noticed(
    run: Runner, trained: list[str], tmp_path: Path, capsys: Shown
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(OWN)
    rows = [f"{file}:Mean", f"[kd, {{type: '{file}:Mean', weight: 0.5}}]"]
    assert run("--epochs", "1", "--criterion", *rows) == 0
    one, both = results(tmp_path / "out")
    assert list(one["terms"]) == ["CE", "Mean"]
    assert set(both["terms"]) == {"CE", "KD", "Mean"}
    file.write_text("# a comment changes nothing\n" + OWN)
    capsys.readouterr()
    assert run("--epochs", "1", "--criterion", *rows) == 0
    assert "other code" not in capsys.readouterr().out
    assert len(trained) == 3
    file.write_text(OWN.replace("1.0", "2.0"))
    assert run("--epochs", "1", "--criterion", *rows) == 0
    said = capsys.readouterr().out
    assert said.count("its result was made by other code, so it is trained again") == 2
    assert len(trained) == 5
    again = [found["terms"]["Mean"] for found in results(tmp_path / "out")[2:]]
    assert again[0] != one["terms"]["Mean"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dss", "unknown 'dss'; did you mean 'ds'"),
        ("KDLos", "did you mean 'KDLoss'"),
        ("[kd, KDLos]", "did you mean 'KDLoss'"),
        ("{type: KDLoss, temprature: 2}", "temprature"),
        ("{type: KDLoss, temperature: -1}", "temperature"),
        ("{type: KDLoss, weight: -1}", "weight"),
        ("{type: kd, temperature: 2}", "KDLoss"),
        ("{temperature: 2}", "a dict with a type"),
        ("{type: 3}", "a dict with a type"),
        ("3", "must be a name, a dict with a type or a list"),
        ("", "must be a name, a dict with a type or a list"),
        ("[]", "names no criterion"),
        ("[alone]", "'alone' among others"),
        ("[kd, alone]", "'alone' among others"),
        ("[{type: SupervisionLoss, wieght: 0}, KDLoss]", "with a weight of at least 0 and nothing"),
        (
            "[{type: SupervisionLoss, weight: -1}, KDLoss]",
            "with a weight of at least 0 and nothing",
        ),
        ("[{type: SupervisionLoss, weight: x}, KDLoss]", "with a weight of at least 0 and nothing"),
        ("[SupervisionLoss, KDLoss, SupervisionLoss]", "SupervisionLoss stands once"),
        ("[kd", "is no YAML"),
        ("missing.py:Mean", "there is no file"),
        ("{here}/mine.py:Meen", "mine.py has no structkd.Criterion named Meen"),
        ("{here}/mine.py:FACTOR", "mine.py has no structkd.Criterion named FACTOR"),
        ("{here}/broken.py:Mean", "broken.py, line 2"),
    ],
)
def test_a_spec_that_means_nothing_is_one_line_before_anything_is_trained(
    text: str, message: str, run: Runner, trained: list[str], tmp_path: Path, capsys: Shown
) -> None:
    (tmp_path / "mine.py").write_text(OWN)
    (tmp_path / "broken.py").write_text("import structkd\nclass Mean(:\n")
    assert run("--criterion", text.replace("{here}", str(tmp_path))) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert trained == []


def test_no_row_at_all_is_one_line(run: Runner, capsys: Shown) -> None:
    assert run("--criterion") == 2
    assert "--criterion names nothing; fix: " in capsys.readouterr().err


def test_a_file_of_ones_own_may_lie_in_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(OWN)
    monkeypatch.setenv("HOME", str(tmp_path))
    found = script.Method.of("~/mine.py:Mean").described["own code"]
    assert found.keys() == {"~/mine.py"}


def test_a_row_that_does_not_fit_is_stored_as_failed_and_the_rest_is_trained(
    run: Runner, trained: list[str], tmp_path: Path, capsys: Shown
) -> None:
    rows = ("alone", "{type: KDLoss, temprature: 2}", "kd")
    assert run("--epochs", "1", "--criterion", *rows) == 1
    said = capsys.readouterr().out
    assert "preflight: 2 students to train" in said
    assert trained[1:] == ["alone seed 0", "kd seed 0"]
    failed = next(found for found in results(tmp_path / "out") if "failed" in found)
    assert "temprature" in failed["failed"]
    assert "failed: " in (tmp_path / "out/results.md").read_text()


def test_an_own_criterion_that_breaks_ends_its_row_alone_and_its_line_is_told(
    run: Runner, trained: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(OWN.replace("FACTOR *", '{}["factor"] *'))
    assert run("--epochs", "1", "--criterion", f"{file}:Mean", "kd") == 1
    assert trained[1:] == ["kd seed 0"]
    failed = next(found for found in results(tmp_path / "out") if "failed" in found)
    assert failed["failed"] == "KeyError: 'factor' (mine.py, line 11)"
