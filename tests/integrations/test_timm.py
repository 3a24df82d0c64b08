"""timm's training flow with structkd's task in it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.task
import torch
import torch.nn.functional as F
from torch import nn

import structkd
from structkd.integrations import timm as plugin
from structkd.integrations.timm import DistillationTask
from tests.integrations import folders
from tests.integrations.scheduled import Scheduled
from tests.integrations.timm_flow import Flow, Outcome, train

# One with parameters, one without.
SPEC = [
    {"type": "FitNetLoss", "weight": 0.1},
    {"type": "KDLoss", "temperature": 2.0, "weight": 0.5},
]


def _net(name: str = "test_resnet", seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(name, num_classes=4, **options)


def _task(model: nn.Module, criterion: nn.Module, **options: Any) -> DistillationTask:
    teacher = _net(seed=1).to(options.get("dtype"))
    options = {"distill": SPEC, "verbose": False, **options}
    return DistillationTask(model, teacher, criterion, **options)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.write(tmp_path_factory.mktemp("images"))


@pytest.fixture
def flow(data: Path, tmp_path: Path) -> Flow:
    return Flow(data=data, output=tmp_path / "out")


def _criterion_of(outcome: Outcome) -> dict[str, torch.Tensor]:
    return outcome.task.get_task_state()["criterion"]


def test_two_epochs_train_validate_and_save_no_teacher(flow: Flow) -> None:
    before: dict[str, torch.Tensor] = {}

    def build(**options: Any) -> DistillationTask:
        task = _task(**options)
        named = task.distiller.criterion.named_parameters()
        before.update({name: value.detach().clone() for name, value in named})
        return task

    flow.ema = True
    student = _net()
    names = set(student.state_dict())
    outcome = train(flow, student, build)
    assert outcome.losses[1] < outcome.losses[0]
    assert outcome.evaluated[-1]["top1"] > 0
    after = dict(outcome.task.distiller.criterion.named_parameters())
    assert before
    assert all(not torch.equal(before[name], after[name]) for name in before)
    saved = torch.load(flow.output / "last.pth.tar", weights_only=True)
    assert set(saved["state_dict"]) == names == set(saved["state_dict_ema"])
    assert set(saved["task_state"]) == {"criterion", "epoch", "epoch_open"}
    assert set(saved["task_state"]["criterion"]) == set(_criterion_of(outcome))
    teacher = outcome.task.teacher
    for own, kept in zip(teacher.parameters(), _net(seed=1).parameters(), strict=True):
        assert torch.equal(own, kept)
    assert not any("teacher" in key for key in outcome.task.state_dict())


@pytest.mark.parametrize("ema", [False, True])
def test_a_resumed_run_goes_on_to_the_bit(data: Path, tmp_path: Path, ema: bool) -> None:
    def build(**options: Any) -> DistillationTask:
        return _task(distill=[*SPEC, {"type": Scheduled}], **options)

    whole = train(Flow(data, tmp_path / "whole", ema=ema), _net(), build)
    train(Flow(data, tmp_path / "cut", ema=ema, stop_after=1), _net(), build)
    checkpoint = tmp_path / "cut" / "last.pth.tar"
    resumed = train(Flow(data, tmp_path / "cut", ema=ema, resume=checkpoint), _net(), build)
    assert resumed.steps == whole.steps[len(whole.steps) // 2 :]
    wanted, got = whole.state(), resumed.state()
    assert wanted.keys() == got.keys()
    assert [key for key in wanted if not torch.equal(wanted[key], got[key])] == []
    (ended,) = (
        value for key, value in got.items() if key.startswith("task_state.") and "ended" in key
    )
    assert ended == 1  # the second epoch is still open


def test_loss_is_the_plain_loops_to_the_bit() -> None:
    student, teacher = _net(), _net("test_vit", seed=1, img_size=32)
    plain = structkd.Distiller(
        _net(),
        _net("test_vit", seed=1, img_size=32),
        [structkd.KDLoss(), structkd.AttentionTransferLoss()],
    )
    task = DistillationTask(
        student,
        teacher,
        distill=[{"type": "KDLoss"}, {"type": "AttentionTransferLoss"}],
        verbose=False,
    )
    x, target = torch.randn(8, 3, 32, 32), torch.arange(8) % 4
    task.train()
    plain.train()
    result = task(x, target)
    output, terms = plain(x, target, x_teacher=x)
    loss = F.cross_entropy(output, target) + sum(terms.values())
    assert torch.equal(result["loss"], loss)
    assert list(terms) == list(result)[4:]
    result["loss"].backward()
    loss.backward()
    for own, other in zip(task.distiller.parameters(), plain.parameters(), strict=True):
        assert own.grad is None or torch.equal(own.grad, other.grad)


@pytest.mark.parametrize(
    ("weights", "wanted"),
    [
        ({}, (1.0, 1.0)),
        ({"distill_loss_weight": 3.0}, (1.0, 3.0)),
        ({"task_loss_weight": 0.25}, (0.25, 0.75)),
        ({"task_loss_weight": 2.0, "distill_loss_weight": 0.5}, (2.0, 0.5)),
    ],
)
def test_weights_are_timms(weights: dict[str, float], wanted: tuple[float, float]) -> None:
    task = _task(_net(), nn.CrossEntropyLoss(), distill={"type": "KDLoss"}, **weights)
    found = task(torch.randn(4, 3, 32, 32), torch.arange(4))
    total = wanted[0] * found["task_loss"] + wanted[1] * found["KD"]
    assert torch.equal(found["loss"], total)


def test_the_teachers_input_is_normalised_anew_as_in_timm() -> None:
    teacher = _net(seed=1)
    teacher.pretrained_cfg = {
        **teacher.pretrained_cfg,
        "mean": (0.4, 0.5, 0.6),
        "std": (0.2, 0.3, 0.4),
    }
    task = DistillationTask(_net(), teacher, distill={"type": "KDLoss"}, verbose=False)
    reference = timm.task.FeatureDistillationTask(_net(), teacher, verbose=False)
    x = torch.randn(2, 3, 32, 32)
    wanted = reference.teacher.normalize_input(x, reference.student_mean, reference.student_std)
    seen: list[torch.Tensor] = []
    teacher.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    task(x, torch.arange(2))
    task((x, x + 1), torch.arange(2))
    assert torch.equal(seen[0], wanted)
    assert not torch.equal(wanted, x)
    assert torch.equal(seen[1], x + 1)


def test_a_pair_goes_to_two_networks() -> None:
    task = DistillationTask(
        _net(in_chans=1), _net(seed=1), distill={"type": "KDLoss"}, verbose=False
    )
    found = task([torch.randn(2, 1, 32, 32), torch.randn(2, 3, 48, 48)], torch.arange(2))
    assert torch.isfinite(found["loss"])


def test_rows_without_a_pair_are_left_out() -> None:
    task = _task(_net(), nn.CrossEntropyLoss(), distill={"type": "KDLoss"}).eval()
    x, x_teacher = torch.randn(2, 4, 3, 32, 32)
    mask, target = torch.tensor([True, False, True, False]), torch.arange(4)
    found = task((x, x_teacher, mask), target)
    assert found["output"].shape == (4, 4)
    torch.testing.assert_close(found["KD"], task((x[::2], x_teacher[::2]), target[::2])["KD"])
    nobody = task((x, x_teacher, ~(mask | True)), target)
    assert nobody["kd_loss"] == 0


def test_the_terms_weight_falls_over_the_epochs_and_goes_on_after_a_resume() -> None:
    def make() -> DistillationTask:
        spec = {"type": "KDLoss"}
        return _task(_net(), nn.CrossEntropyLoss(), distill=spec, falling_epochs=2)

    task = make()
    x, target, weights = torch.randn(4, 3, 32, 32), torch.arange(4), []
    for _ in range(3):
        task.train()
        found = task(x, target)
        weights.append(float(((found["loss"] - found["task_loss"]) / found["kd_loss"]).detach()))
        state = task.get_task_state()
    assert weights == pytest.approx([1.0, 0.5, 0.0], abs=1e-6)
    resumed = make()
    resumed.load_task_state(state)
    assert resumed.distiller.epoch == 2


def test_optimizer_groups_reach_student_and_criterion() -> None:
    task = DistillationTask(
        _net("test_vit", img_size=32),
        _net(seed=1),
        distill={"type": "FitNetLoss"},
        layers={"intermediate": "blocks.1"},
        teacher_layers={},
        verbose=False,
    )
    module = task.get_trainable_module()
    optimizer = timm.optim.create_optimizer_v2(
        module, opt="adamw", lr=0.1, weight_decay=0.5, layer_decay=0.5
    )
    named = {id(value): name for name, value in module.named_parameters()}
    decays = {named[id(p)]: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    scales = {named[id(p)]: g["lr_scale"] for g in optimizer.param_groups for p in g["params"]}
    assert set(decays) == set(named.values())
    assert decays["student.pos_embed"] == 0 == decays["student.blocks.0.norm1.weight"]
    assert decays["student.head.weight"] == 0.5
    assert scales["student.blocks.0.norm1.weight"] < scales["student.head.weight"] == 1
    own = [name for name in named.values() if name.startswith("criterion.")]
    assert own
    assert {scales[name] for name in own} == {1.0}
    clipped = {id(p) for p in task.get_clip_parameters(exclude_head=True)}
    assert {named[key] for key in named.keys() - clipped} == {
        "student.head.weight",
        "student.head.bias",
    }


@pytest.mark.parametrize(
    "options",
    [
        {"amp": True},
        {"dtype": torch.bfloat16},
        {"mixup": 0.8},
        {"channels_last": True},
        {"optimizer": {"opt": "sgd", "lr": 0.05, "momentum": 0.9, "layer_decay": 0.8}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_the_scripts_options(flow: Flow, options: dict[str, Any]) -> None:
    for name, value in options.items():
        setattr(flow, name, value)
    outcome = train(flow, _net(), _task)
    assert outcome.losses[1] < outcome.losses[0]
    for value in _criterion_of(outcome).values():
        assert value.dtype not in (torch.bfloat16, torch.float16)


def test_gradient_checkpointing_changes_nothing(data: Path, tmp_path: Path) -> None:
    plain = train(Flow(data, tmp_path / "plain", epochs=1), _net(), _task)
    student = _net()
    student.set_grad_checkpointing(True)
    checkpointed = train(Flow(data, tmp_path / "less", epochs=1), student, _task)
    assert checkpointed.steps == pytest.approx(plain.steps, rel=1e-5)


@pytest.mark.slow
def test_compiled_averaged_and_autocast_at_once(flow: Flow) -> None:
    flow.ema, flow.amp, flow.compiles = True, True, "eager"  # what is tested is what Dynamo traces
    outcome = train(flow, _net(), _task)
    assert outcome.losses[1] < outcome.losses[0]
    saved = torch.load(flow.output / "last.pth.tar", weights_only=True)
    assert set(saved["state_dict"]) == set(_net().state_dict())
    wanted = outcome.task.distiller.student.state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in saved["state_dict"].items())


SCRIPT = """
import sys
import torch
from timm.task import ClassificationTask, FeatureDistillationTask, LogitDistillationTask
import timm

student, teacher = (timm.create_model("test_resnet", num_classes=4) for _ in range(2))
if "--logit" in sys.argv:
    LogitDistillationTask(student, teacher)
task = FeatureDistillationTask(student_model=student, teacher_model=teacher,
                               student_feature_dim=None, teacher_feature_dim=None, verbose=False)
found = task(torch.zeros(2, 3, 32, 32), torch.arange(2))
open(sys.argv[1], "w").write(" ".join([__name__, *found]))
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return path


def test_launcher_runs_a_script_with_the_task_swapped_in(script: Path, tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text("distill:\n- {type: KDLoss, weight: 0.5}\n- AttentionTransferLoss\n")
    kept, argv = dict(vars(timm.task)), sys.argv
    plugin.main(["--distill", str(spec), str(script), str(tmp_path / "found")])
    assert (tmp_path / "found").read_text().split() == [
        "__main__",
        "loss",
        "output",
        "task_loss",
        "kd_loss",
        "KD",
        "AT",
    ]
    assert dict(vars(timm.task)) == kept
    assert sys.argv is argv


def test_the_docs_spec_builds_a_task() -> None:
    path = Path(__file__).parents[2] / "examples" / "integrations" / "spec.yaml"
    task = DistillationTask(_net(), _net(seed=1), verbose=False, **plugin.read_spec(path))
    assert task.distiller.criterion.weights == {"DSLoss": 1.0, "KDLoss": 0.5}


def test_launcher_refuses_a_script_that_would_not_distil(script: Path, tmp_path: Path) -> None:
    kept = timm.task.LogitDistillationTask
    with pytest.raises(ValueError, match=r"LogitDistillationTask.*--kd-distill-type feature"):
        plugin.main([str(script), str(tmp_path / "found"), "--logit"])
    assert timm.task.LogitDistillationTask is kept


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("distil: {type: KDLoss}", "must hold a criterion"),
        ("distill: {type: KDLoss}\nlayer: fc", "no entry 'layer'.*layers"),
        ("[1, 2", "is no YAML"),
    ],
)
def test_launcher_reads_only_what_it_knows(
    script: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(text)
    with pytest.raises(ValueError, match=message):
        plugin.read_spec(spec)
    with pytest.raises(SystemExit):
        plugin.main(["--distill", str(spec), str(script)])
    assert "spec.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "--falling needs the length"), (["--epochs", "ten"], "--epochs: invalid int value")],
)
def test_launcher_says_what_falling_needs(
    script: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        plugin.main(["--falling", str(script), *arguments])
    assert message in capsys.readouterr().err


def test_launcher_says_where_the_script_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        plugin.main(["nowhere/train.py"])
    assert "pytorch-image-models" in capsys.readouterr().err


def _wrong(kind: str) -> Any:
    x, target = torch.randn(2, 3, 32, 32), torch.arange(2)
    student, teacher = _net(), _net(seed=1)
    kd: Any = {"type": "KDLoss"}
    if kind == "classes":
        torch.manual_seed(0)
        other = timm.create_model("test_resnet", num_classes=7)
        return DistillationTask(student, other, distill=kd, verbose=False)(x, target)
    if kind == "layer":
        layers = {"intermediate": "layer33"}
        spec = {"type": "AttentionTransferLoss"}
        return DistillationTask(student, teacher, distill=spec, layers=layers, verbose=False)
    if kind == "pretrained_cfg":
        return DistillationTask(nn.Linear(2, 2), teacher, distill=kd)
    if kind == "criterion":
        return DistillationTask(student, teacher, distill={"type": "KDLos"}, verbose=False)
    if kind == "option":
        spec = {"type": "KDLoss", "temprature": 1}
        return DistillationTask(student, teacher, distill=spec, verbose=False)
    if kind == "soft labels":
        task = DistillationTask(student, teacher, distill={"type": "DKDLoss"}, verbose=False)
        return task(x, torch.full((2, 4), 0.25))
    task = DistillationTask(student, teacher, distill=kd, verbose=False)
    if kind == "triple":
        return task((x, x, x), target)
    if kind == "four":
        return task((x, x, x, x), target)
    if kind == "mapping":
        return task({"image": x}, target)
    return task.load_checkpoint_state(student.state_dict(), None, ema=True)


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("classes", ValueError, "same classes, got num_classes=4 and 7"),
        ("layer", ValueError, "'layer33' is no layer.*layer3"),
        ("pretrained_cfg", ValueError, "Linear, has no pretrained_cfg.*set student_model"),
        ("criterion", ValueError, "'KDLos' is no criterion.*KDLoss"),
        ("option", TypeError, "no option 'temprature'.*temperature"),
        ("soft labels", (TypeError, ValueError), "target must be.*class indices"),
        ("triple", ValueError, "the mask of rows that have a pair must be bool, got float32"),
        ("four", ValueError, "the loader must yield.*came 4 of"),
        ("mapping", ValueError, "the loader must yield.*came"),
        ("ema", RuntimeError, "setup_ema"),
    ],
)
def test_bad_input_says_what_to_do(kind: str, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        _wrong(kind)


def test_a_checkpoint_without_the_criterion_is_refused() -> None:
    task = _task(_net(), nn.CrossEntropyLoss())
    with pytest.raises(RuntimeError, match="no state of the criterion"):
        task.load_checkpoint_state(_net().state_dict())


def test_a_teachers_name_makes_it_with_the_students_classes(tmp_path: Path) -> None:
    torch.save(_net(seed=1).state_dict(), tmp_path / "teacher.pth")
    task = DistillationTask(
        _net(),
        "test_resnet",
        distill={"type": "KDLoss"},
        verbose=False,
        teacher_pretrained_path=str(tmp_path / "teacher.pth"),
    )
    assert torch.equal(task.teacher.fc.weight, _net(seed=1).fc.weight)
    assert not any(parameter.requires_grad for parameter in task.teacher.parameters())
    task.train()
    assert not task.teacher.training
