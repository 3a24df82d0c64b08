"""One module that a training loop can own: copied, compiled, saved, moved, exported."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import structkd
from structkd import Criterion, CriterionSum, Distiller, FeatureCapture


def net(width: int, classes: int = 5) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, classes),
    )


LAYERS = {"intermediate": "2", "embedding": "5:input"}
POOR, RICH = torch.randn(2, 6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TARGET = torch.arange(6) % 5


def distiller(criterion: object = structkd.DSLoss, **options: object) -> Distiller:
    torch.manual_seed(0)
    made = {"example": (POOR, RICH), "layers": LAYERS, **options}
    return Distiller(net(4), net(6), criterion, **made)


def step(module: nn.Module, inner: Distiller, optimizer: torch.optim.Optimizer) -> Tensor:
    output, terms = module(POOR, TARGET, x_teacher=RICH)
    loss = F.cross_entropy(output, TARGET) + sum(terms.values())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def test_it_is_the_captures_and_the_criterion_in_one() -> None:
    whole = distiller(structkd.KDLoss() + 0.5 * structkd.CorrelationCongruenceLoss())
    output, terms = whole(POOR, TARGET, x_teacher=RICH)
    whole.detach()
    student = FeatureCapture(whole.student, **LAYERS)
    teacher = FeatureCapture(whole.teacher, **LAYERS)
    feats_s = student(POOR)
    with torch.no_grad():
        feats_t = teacher(RICH)
    wanted = whole.criterion.terms(feats_s, feats_t, TARGET)
    torch.testing.assert_close(output, feats_s.logits, rtol=0, atol=0)
    assert terms.keys() == wanted.keys() == {"KD", "CC"}
    for name, value in terms.items():
        torch.testing.assert_close(value, wanted[name], rtol=0, atol=0)


def test_another_teacher_is_refused() -> None:
    whole = distiller()
    first = whole.teacher
    with pytest.raises(AttributeError, match="teacher cannot be replaced"):
        whole.teacher = copy.deepcopy(first)
    assert whole.teacher is first
    assert not any("teacher" in name for name in whole.state_dict())


def test_a_criterion_that_reads_what_was_not_captured_is_refused() -> None:
    whole = distiller(structkd.FitNetLoss())
    whole.criterion = structkd.KDLoss()  # logits are the student's own output
    assert list(whole(POOR, x_teacher=RICH)[1]) == ["KD"]
    with pytest.raises(AttributeError, match="criterion cannot be replaced by one that reads more"):
        whole.criterion = structkd.CORALLoss()
    lone = distiller(structkd.SupervisionLoss())
    with pytest.raises(AttributeError, match="make a new Distiller"):
        lone.criterion = structkd.KDLoss()  # nothing reads this teacher


def test_the_teacher_is_frozen_and_nowhere_to_be_found() -> None:
    whole = distiller()
    before = copy.deepcopy(whole.teacher.state_dict())
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.1, weight_decay=0.1)
    whole.train()
    assert not whole.teacher.training
    first = step(whole, whole, optimizer)
    for _ in range(10):
        last = step(whole, whole, optimizer)
    assert last < first
    for name, value in whole.teacher.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    held = {id(p) for p in whole.teacher.parameters()}
    assert not held & {id(p) for p in whole.parameters()}
    assert all(not p.requires_grad for p in whole.teacher.parameters())
    assert {key.split(".")[0] for key in whole.state_dict()} == {"student", "criterion"}
    assert whole.teacher not in list(whole.modules())


def test_the_student_stays_the_users_own(tmp_path: Path) -> None:
    student = net(4)
    keys = list(student.state_dict())
    whole = Distiller(student, net(6), structkd.DSLoss, example=(POOR, RICH), layers=LAYERS)
    assert whole.student is student
    step(whole, whole, torch.optim.SGD(whole.parameters(), lr=0.1))
    assert list(student.state_dict()) == keys
    path = tmp_path / "last.pt"
    torch.save(student.state_dict(), path)  # the last checkpoint of an interrupted run
    bare = net(4)
    bare.load_state_dict(torch.load(path, weights_only=True))
    student.eval()
    torch.testing.assert_close(bare.eval()(POOR), student(POOR), rtol=0, atol=0)
    student.class_weights = torch.ones(5)
    assert whole.student.class_weights is student.class_weights
    twin = copy.deepcopy(whole)
    torch.testing.assert_close(twin.student.class_weights, student.class_weights)


def test_export_while_the_hooks_are_on_and_after() -> None:
    whole = distiller()
    whole.eval()
    want = whole.student(POOR)
    torch.testing.assert_close(torch.export.export(whole.student, (POOR,)).module()(POOR), want)
    traced = torch.jit.trace(whole.student, POOR, check_trace=False)
    torch.testing.assert_close(traced(POOR), want)
    bare = whole.detach()
    assert bare is whole.student
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in bare.modules())
    torch.testing.assert_close(torch.jit.script(bare)(POOR), want)
    with pytest.raises(RuntimeError, match=r"detached: call attach\(\)"):
        whole(POOR, x_teacher=RICH)
    whole.attach()
    assert whole(POOR, x_teacher=RICH)[1]


@pytest.mark.slow
def test_onnx_export_while_the_hooks_are_on(tmp_path: Path) -> None:
    whole = distiller()
    torch.onnx.export(whole.student.eval(), (POOR,), tmp_path / "student.onnx", dynamo=True)
    assert (tmp_path / "student.onnx").stat().st_size > 0


@pytest.mark.parametrize("copied", ["deepcopy", "ema", "average", "pickle", "save"])
def test_copies_work_and_leave_the_original_alone(copied: str) -> None:
    whole = distiller()
    whole.eval()
    _, want = whole(POOR, x_teacher=RICH)
    if copied == "deepcopy":
        twin = copy.deepcopy(whole)
    elif copied == "ema":
        twin = ModelEmaV3(whole).module
    elif copied == "average":
        twin = torch.optim.swa_utils.AveragedModel(whole).module
    elif copied == "pickle":
        twin = pickle.loads(pickle.dumps(whole))
    else:
        file = io.BytesIO()
        torch.save(whole, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert twin.student is not whole.student
    if copied in ("deepcopy", "ema", "average"):
        assert twin.teacher is whole.teacher
    _, got = twin.eval()(POOR, x_teacher=RICH)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=0)
    output, terms = whole.train()(POOR, x_teacher=RICH)
    with torch.no_grad():
        twin(POOR, x_teacher=RICH)
    (output.sum() + sum(terms.values())).backward()
    assert whole.student[0].weight.grad is not None
    assert twin.student[0].weight.grad is None


@pytest.mark.parametrize("copied", ["deepcopy", "pickled copy"])
def test_who_is_detached_leaves_its_copies_their_hooks_on_the_teacher(copied: str) -> None:
    whole = distiller(structkd.KDLoss())
    twin = copy.deepcopy(whole)
    if copied == "pickled copy":
        twin = pickle.loads(pickle.dumps(twin))
    twin.detach()
    assert list(whole(POOR, x_teacher=RICH)[1]) == ["KD"]
    twin.attach()
    whole.detach()
    assert list(twin(POOR, x_teacher=RICH)[1]) == ["KD"]
    late = copy.deepcopy(twin)
    twin.detach()
    assert list(late(POOR, x_teacher=RICH)[1]) == ["KD"]
    late.detach()
    for teacher in (whole.teacher, twin.teacher):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in teacher.modules())


def test_a_copy_that_is_moved_takes_a_teacher_of_its_own_along() -> None:
    whole = distiller()
    twin = copy.deepcopy(whole).to("cpu")
    assert twin.teacher is whole.teacher
    twin.double()
    assert twin.teacher is not whole.teacher
    assert whole.teacher[0].weight.dtype == torch.float32
    assert twin(POOR.double(), x_teacher=RICH.double())[1]["SEM-1"].dtype == torch.float64
    assert whole(POOR, x_teacher=RICH)[1]["SEM-1"].dtype == torch.float32


@pytest.mark.parametrize("criterion", ["DSLoss", "SemanticCalibrationLoss"])
def test_channels_last_before_the_criterion_has_a_shape(criterion: str) -> None:
    plain = distiller(criterion, example=None)
    whole = distiller(criterion, example=None).to(memory_format=torch.channels_last)
    assert whole.teacher[0].weight.is_contiguous(memory_format=torch.channels_last)
    torch.manual_seed(1)
    _, want = plain(POOR, x_teacher=RICH)
    torch.manual_seed(1)
    _, found = whole(POOR, x_teacher=RICH)
    torch.testing.assert_close(found, want)


def test_a_student_without_memory_gets_some_and_the_teacher_keeps_its_weights() -> None:
    with torch.device("meta"):
        student = net(4)
    teacher = net(6)
    kept = copy.deepcopy(teacher.state_dict())
    whole = Distiller(student, teacher, structkd.KDLoss()).to_empty(device="cpu")
    torch.testing.assert_close(whole.teacher.state_dict(), kept, rtol=0, atol=0)
    whole.student.load_state_dict(net(4).state_dict())
    assert whole(POOR, x_teacher=RICH)[1]["KD"].isfinite()
    with torch.device("meta"):
        both = Distiller(net(4), net(6), structkd.KDLoss()).to_empty(device="cpu")
    both.teacher.load_state_dict(kept)
    assert not both.teacher[0].weight.is_meta


def test_an_average_of_the_whole_and_one_of_the_student() -> None:
    whole = distiller()
    of_whole, of_student = ModelEmaV3(whole, decay=0.5), ModelEmaV3(whole.student, decay=0.5)
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.5)
    for _ in range(3):
        step(whole, whole, optimizer)
        of_whole.update(whole)
        of_student.update(whole.student)
    for name, value in of_student.module.state_dict().items():
        torch.testing.assert_close(value, of_whole.module.student.state_dict()[name])
    assert not torch.equal(of_student.module[0].weight, whole.student[0].weight)


def test_an_average_of_a_criterion_with_a_memory() -> None:
    spec = {"type": "ContrastiveRepresentationLoss", "dataset_size": 9, "negatives": 4}
    whole = distiller(spec)
    average = ModelEmaV3(whole, decay=0.5)
    head = whole.criterion.head_s.net[0].weight
    before = head.detach().clone()
    for _ in range(2):
        _, terms = whole(POOR, TARGET, x_teacher=RICH, index=torch.arange(6))
        sum(terms.values()).backward()
        with torch.no_grad():
            head -= head.grad
        average.update(whole)
    averaged = average.module.criterion.head_s.net[0].weight
    assert not torch.equal(averaged, before)
    assert not torch.equal(averaged, head)


@pytest.mark.parametrize("average", [{}, {"multi_avg_fn": get_ema_multi_avg_fn(0.5)}])
@pytest.mark.parametrize(
    "criterion",
    [
        {"type": "ContrastiveRepresentationLoss", "dataset_size": 9, "negatives": 4},
        {"type": "CurriculumTemperatureLoss"},
    ],
    ids=lambda value: value.get("type", "average"),
)
def test_an_average_with_the_buffers_takes_every_memory(criterion, average) -> None:
    whole = distiller(criterion)
    mean = AveragedModel(whole, use_buffers=True, **average)
    given = {"target": TARGET, "index": torch.arange(6)}
    with torch.no_grad():
        mean.update_parameters(whole)  # before the first step, where a memory is empty
    for _ in range(2):
        sum(whole(POOR, x_teacher=RICH, **given)[1].values()).backward()
        mean.update_parameters(whole)
    for module in (whole, mean.module):
        module.eval()
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.reset_running_stats()
        if hasattr(module.criterion, "bank_s"):
            for bank in (module.criterion.bank_s, module.criterion.bank_t):
                bank.fill_(0.1)
    # The parameters did not move, so that what the average says is what the original says.
    wanted, found = (module(POOR, x_teacher=RICH, **given)[1] for module in (whole, mean.module))
    torch.testing.assert_close(found, wanted)


def test_state_dict_round_trip() -> None:
    whole, other = distiller(), distiller()
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.5)
    step(whole, whole, optimizer)
    other.load_state_dict(whole.state_dict())
    whole.eval()
    other.eval()
    for name, value in whole(POOR, x_teacher=RICH)[1].items():
        torch.testing.assert_close(other(POOR, x_teacher=RICH)[1][name], value, rtol=0, atol=0)


@pytest.mark.slow
def test_it_compiles_whole() -> None:
    torch.compiler.reset()
    whole = distiller(structkd.DSLoss)
    plain = copy.deepcopy(whole)
    fast = torch.compile(whole, backend="inductor", fullgraph=True)
    for module, inner in ((fast, whole), (plain, plain)):
        optimizer = torch.optim.SGD(inner.parameters(), lr=0.1)
        for _ in range(3):
            step(module, inner, optimizer)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(whole.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_it_compiles_for_images_of_any_size() -> None:
    torch.compiler.reset()
    student, teacher = (timm.create_model("resnet10t", num_classes=5).eval() for _ in range(2))
    whole = Distiller(student, teacher, structkd.DSLoss, example=torch.randn(2, 3, 32, 32)).eval()
    fast = torch.compile(whole, backend="eager", dynamic=True)
    for size in (64, 96, 128):
        images = torch.randn(2, 3, size, size)
        for name, value in whole(images, x_teacher=images)[1].items():
            torch.testing.assert_close(fast(images, x_teacher=images)[1][name], value)


def test_autocast_ema_and_compile_at_once() -> None:
    torch.compiler.reset()
    whole = distiller([{"type": "DSLoss"}, {"type": "KDLoss", "weight": 0.5}])
    average = ModelEmaV3(whole, decay=0.9)
    fast = torch.compile(whole, backend="aot_eager")
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.1)
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            output, terms = fast(POOR, TARGET, x_teacher=RICH)
            loss = F.cross_entropy(output, TARGET) + sum(terms.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update(whole)
    assert output.dtype == torch.bfloat16
    assert all(term.dtype == torch.float32 and term.isfinite() for term in terms.values())
    with torch.no_grad():
        assert average.module(POOR, x_teacher=RICH)[1].keys() == terms.keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_module_keeps_its_criterion_in_float32(dtype: torch.dtype) -> None:
    whole = distiller().to(dtype)
    assert whole.teacher[0].weight.dtype == dtype
    assert {p.dtype for p in whole.criterion.parameters()} == {torch.float32}
    output, terms = whole(POOR.to(dtype), x_teacher=RICH.to(dtype))
    (output.sum() + sum(terms.values())).backward()
    assert whole.student[0].weight.grad.dtype == dtype


@pytest.mark.parametrize(
    ("name", "options"),
    [("test_resnet", {}), ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2})],
)
def test_gradient_checkpointing_of_a_timm_student(name: str, options: dict[str, int]) -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 4, 3, 32, 32)
    whole = Distiller(
        timm.create_model(name, num_classes=5, **options),
        timm.create_model("test_resnet", num_classes=5),
        structkd.DSLoss,
        example=images[0],
    )
    whole.student.set_grad_checkpointing(True)
    output, terms = whole(images[0], x_teacher=images[1])
    (output.sum() + sum(terms.values())).backward()
    assert all(p.grad is not None for p in whole.parameters())


def test_inputs_of_several_arguments() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 4)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return self.fc(left + right)

    left, right = torch.randn(2, 5, 3)
    whole = Distiller(Two(), Two(), structkd.KDLoss())
    (by_place, _), (by_name, _) = (
        whole(given, x_teacher=given) for given in ((left, right), {"left": left, "right": right})
    )
    torch.testing.assert_close(by_place, by_name)


def test_what_a_criterion_may_be() -> None:
    made = {
        "object": structkd.KDLoss(),
        "class": structkd.KDLoss,
        "name": "KDLoss",
        "dict": {"type": "KDLoss", "temperature": 2.0},
        "dict of a class": {"type": structkd.KDLoss},
        "list": [{"type": "KDLoss", "weight": 0.5}, structkd.CORALLoss],
    }
    for spec in made.values():
        torch.manual_seed(0)
        whole = Distiller(net(4), net(4), spec, example=POOR, layers=LAYERS)
        assert isinstance(whole.criterion, Criterion)
        assert "KD" in whole(POOR, x_teacher=POOR)[1]
    assert isinstance(whole.criterion, CriterionSum)
    assert whole.criterion.weights == {"KDLoss": 0.5, "CORALLoss": 1.0}
    named = Distiller(
        net(4), net(4), [{"type": "KDLoss", "name": "soft"}], example=POOR, layers=LAYERS
    )
    assert list(named.criterion.criteria) == ["soft"]


def test_no_hook_without_a_reader() -> None:
    whole = distiller(structkd.KDLoss())
    hooked = [n for n, m in whole.student.named_modules() if m._forward_hooks]
    assert hooked == [""]


def test_a_network_that_gives_no_map_serves_criteria_that_read_none() -> None:
    student = timm.create_model("crossvit_9_240", num_classes=5)
    teacher = timm.create_model("resnet18", num_classes=5)
    images = torch.randn(2, 3, 240, 240)
    whole = Distiller(student, teacher, [structkd.KDLoss], example=images)
    assert list(whole(images, x_teacher=images)[1]) == ["KD"]
    with pytest.raises(ValueError, match=r"intermediate: layer 'blocks\.1' gave list.*yourself"):
        Distiller(student, teacher, structkd.FitNetLoss, example=images)


def test_epochs_are_passed_on() -> None:
    whole = distiller(structkd.CurriculumTemperatureLoss() + structkd.KDLoss())
    whole.step_epoch()
    whole.step_epoch()
    assert int(whole.criterion.criteria["CurriculumTemperatureLoss"].epoch) == 3


def test_an_index_reaches_a_criterion_with_a_memory() -> None:
    whole = distiller({"type": "ContrastiveRepresentationLoss", "dataset_size": 9, "negatives": 4})
    _, terms = whole(POOR, x_teacher=RICH, index=torch.arange(6))
    assert set(terms) == {"CRD-student", "CRD-teacher"}
    with pytest.raises(ValueError, match="index"):
        whole(POOR, x_teacher=RICH)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("net.pt",), {}, TypeError, r"teacher must be an nn.Module, got the path 'net.pt'.*load"),
        ((Path("net.pt"),), {}, TypeError, r"got the path 'net.pt'"),
        ((3,), {}, TypeError, "teacher must be an nn.Module, got int"),
        ((net(6), "DSLos"), {"example": POOR}, ValueError, r"no criterion.*near names.*DSLoss"),
        ((net(6), {"weight": 1}), {"example": POOR}, ValueError, "needs its type"),
        ((net(6), []), {}, ValueError, "empty list"),
        ((net(6), 7), {"example": POOR}, TypeError, "criterion must be a Criterion.*got int"),
        ((net(6), nn.Linear), {"example": POOR}, TypeError, "must be a class of structkd.Criter"),
        ((net(6), lambda s, t: 3), {}, TypeError, "criterion must be a Criterion.*got function"),
        (
            (net(6), {"type": "KDLoss", "temprature": 2}),
            {"example": POOR},
            TypeError,
            r"KDLoss has no option 'temprature'; near names: temperature",
        ),
        (
            (net(6), "KDLoss"),
            {"example": POOR, "layers": {"intermedate": "1"}},
            ValueError,
            r"layers has no entry 'intermedate'; near names: intermediate",
        ),
        ((net(6), "KDLoss"), {"example": POOR, "layers": "1"}, TypeError, "layers must be a dict"),
        (
            (net(6), "FitNetLoss"),
            {"example": POOR, "layers": {"intermediate": "9"}},
            ValueError,
            "intermediate='9' is no layer",
        ),
    ],
)
def test_bad_input_is_named(arguments, options, error, message) -> None:
    if len(arguments) == 1:
        arguments = (*arguments, structkd.KDLoss())
    with pytest.raises(error, match=message):
        Distiller(net(4), *arguments, **options)


def test_a_teacher_that_is_the_student_is_refused() -> None:
    student = net(4)
    with pytest.raises(ValueError, match=r"share parameters.*copy.deepcopy"):
        Distiller(student, student, structkd.KDLoss())


def test_a_failed_construction_leaves_no_hook_behind() -> None:
    student, teacher = net(4), net(6)
    with pytest.raises(ValueError, match="no criterion"):
        Distiller(student, teacher, "DSLos", example=POOR, layers=LAYERS)
    for layer in (*student.modules(), *teacher.modules()):
        assert not layer._forward_hooks
        assert not layer._forward_pre_hooks
