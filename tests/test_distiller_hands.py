"""What a user naturally does next with a Distiller works, or is told at once with its cure."""

from __future__ import annotations

import copy
import io
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import structkd
from structkd import Distiller
from tests.processes import start

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def net(width: int, classes: int = 10) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(width, classes),
    )


def test_an_optimizer_made_before_the_first_call_trains_student_and_criterion() -> None:
    spec = [structkd.DSLoss(), structkd.DenseStructureLoss(), structkd.FitNetLoss()]
    distiller = Distiller(
        net(4), net(6), spec, layers={"intermediate": "2", "embedding": "6:input"}
    )
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=0.1)
    for _ in range(2):
        output, terms = distiller(X, x_teacher=X)
        before = {name: value.detach().clone() for name, value in distiller.named_parameters()}
        (output.square().mean() + sum(terms.values())).backward()
        optimizer.step()
    still = [n for n, value in distiller.named_parameters() if torch.equal(value, before[n])]
    assert not still
    assert any(name.startswith("criterion.") for name in before)


class Odd(nn.Module):
    """A network of a user's own, whose layers have names that nobody guesses."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.eins = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU())
        self.zwei = nn.Sequential(nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU())
        self.ende = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.ende(self.zwei(self.eins(x)).mean((2, 3)))


def test_all_that_is_missing_is_told_at_once_and_the_cure_works_as_printed() -> None:
    with pytest.raises(ValueError, match="reads fields without a named layer") as told:
        Distiller(Odd(4), Odd(8), structkd.DSLoss())
    said = str(told.value)
    assert "student no embedding and no intermediate" in said
    call = said[said.index("layers=") :].removesuffix(")")
    options = eval(f"dict({call})")
    assert options["layers"]["embedding"] == "ende:input"
    assert set(options["layers"]["intermediate"]) <= {"eins", "zwei"}
    _, terms = Distiller(Odd(4), Odd(8), structkd.DSLoss(), **options)(X, x_teacher=X)
    assert all(term.isfinite() for term in terms.values())


def test_a_layer_that_only_one_network_lacks_is_told_with_its_argument() -> None:
    with pytest.raises(ValueError, match=r"of the teacher, teacher_layers: .*'zwei'"):
        Distiller(Odd(4), net(6), "FitNetLoss", layers={"intermediate": "zwei"})
    with pytest.raises(ValueError, match=r"of the teacher no intermediate.*teacher_layers=dict"):
        Distiller(Odd(4), net(6), "FitNetLoss", layers={"intermediate": "zwei"}, teacher_layers={})


def test_networks_that_teach_each_other_both_train() -> None:
    first, second = net(4), net(6)
    one = Distiller(first, second, structkd.KDLoss())
    with pytest.raises(ValueError, match=r"student has no parameter that trains.*requires_grad_"):
        Distiller(second, first, structkd.KDLoss())
    second.requires_grad_(True)
    two = Distiller(second, first, structkd.KDLoss())
    for distiller in (one.train(), two.train()):
        statistics = copy.deepcopy(distiller.teacher[1].state_dict())
        output, terms = distiller(X, x_teacher=X)
        (output.square().mean() + sum(terms.values())).backward()
        assert all(p.grad is not None for p in distiller.student.parameters())
        assert distiller.student[0].training
        torch.testing.assert_close(distiller.teacher[1].state_dict(), statistics)
        distiller.zero_grad()
    del one, two, distiller
    chained = Distiller(net(2), first, structkd.KDLoss())  # whose training is over
    assert not any(p.requires_grad for p in chained.teacher.parameters())


@pytest.mark.parametrize("kind", ["frozen", "no_grad"])
def test_what_cannot_reach_the_student_is_told(kind: str) -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.rest = nn.Conv2d(3, 4, 3), net(4)[2:]

        def forward(self, x: Tensor) -> Tensor:
            if kind == "no_grad":
                with torch.no_grad():
                    x = self.stem(x)
            else:
                x = self.stem(x)
            return self.rest(x)

    student = Cut()
    student.stem.requires_grad_(False)
    distiller = Distiller(
        student, Cut(), [structkd.KDLoss(), structkd.FitNetLoss()], layers={"intermediate": "stem"}
    ).train()
    with pytest.raises((ValueError, RuntimeError), match=r"nothing .*(frozen layers|no_grad)"):
        distiller(X, x_teacher=X)
    with torch.no_grad():
        assert distiller.eval()(X, x_teacher=X)[1]
    only_logits = Distiller(student, Cut(), structkd.KDLoss()).train()
    assert only_logits(X, x_teacher=X)[1]["KD"].requires_grad


def test_the_teacher_runs_in_eval_mode_whoever_calls_train() -> None:
    class Task(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = net(6)
            self.distiller = Distiller(net(4), self.teacher, structkd.KDLoss())

    task = Task().train()
    before = copy.deepcopy(task.teacher.state_dict())
    assert task.teacher[1].training
    values = {float(task.distiller(X, x_teacher=X + 3)[1]["KD"].detach()) for _ in range(1)}
    task.distiller.student.eval()
    values = {float(task.distiller(X, x_teacher=X + 3)[1]["KD"].detach()) for _ in range(3)}
    assert len(values) == 1  # no dropout
    torch.testing.assert_close(task.teacher.state_dict(), before, rtol=0, atol=0)
    assert task.teacher[1].training  # as the user set it


@pytest.mark.parametrize("student", ["student.", "student._orig_mod."])
def test_optimizers_of_timm_ask_the_student_through_the_distiller(student: str) -> None:
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=10
    )
    teacher = timm.create_model("resnet10t", num_classes=10)
    given = torch.compile(vit) if "_orig_mod" in student else vit
    distiller = Distiller(given, teacher, structkd.KDLoss() + structkd.CORALLoss())

    def decayed(module: nn.Module) -> set[str]:
        optimizer = create_optimizer_v2(module, opt="adamw", lr=1e-3, weight_decay=0.05)
        names = {id(p): name for name, p in module.named_parameters()}
        return {
            names[id(p)].removeprefix(student)
            for group in optimizer.param_groups
            if group["weight_decay"]
            for p in group["params"]
        }

    own = {name for name in decayed(distiller) if not name.startswith("criterion.")}
    assert own == decayed(vit)
    scales = []
    for module in (vit, distiller):
        optimizer = create_optimizer_v2(module, opt="adamw", lr=1e-3, layer_decay=0.75)
        of = {id(p): g["lr_scale"] for g in optimizer.param_groups for p in g["params"]}
        scales.append({n: of[id(p)] for n, p in module.named_parameters()})
    plain, whole = scales
    for name, scale in plain.items():
        assert whole[student + name] == pytest.approx(scale)
    assert {whole[n] for n in whole if n.startswith("criterion.")} == {max(plain.values())}


def _exported(teacher: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(teacher, (X,)), buffer)
    buffer.seek(0)
    return torch.export.load(buffer).module()


def _scripted(teacher: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(teacher), buffer)
        buffer.seek(0)
        return torch.jit.load(buffer)


class Holder(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.parametrize("held", [False, True], ids=["bare", "in a module"])
@pytest.mark.parametrize("load", [_exported, _scripted])
def test_a_teacher_from_a_file_gives_its_logits(load, held: bool) -> None:
    teacher = net(6).eval()
    loaded = load(teacher)
    distiller = Distiller(net(4), Holder(loaded) if held else loaded, structkd.KDLoss()).eval()
    wanted = Distiller(distiller.detach(), teacher, structkd.KDLoss()).eval()
    distiller.attach()
    torch.testing.assert_close(distiller(X, x_teacher=X)[1], wanted(X, x_teacher=X)[1])
    assert distiller.train()(X, x_teacher=X)[1]["KD"].isfinite()


@pytest.mark.parametrize("load", [_exported, _scripted])
def test_maps_of_a_teacher_from_a_file_are_refused_when_it_is_made(load) -> None:
    with pytest.raises((ValueError, TypeError), match="teacher"):
        Distiller(net(4), load(net(6).eval()), "FitNetLoss", layers={"intermediate": "2"})


class Images(nn.Module):
    """Takes one argument, a list of images."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net(4)

    def forward(self, images: list[Tensor]) -> Tensor:
        return self.net(torch.stack(list(images)))


class Sample(Images):
    """Takes one argument, a dict."""

    def forward(self, sample: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        return self.net(sample["image"])


@pytest.mark.parametrize(
    ("kind", "wrong", "right"),
    [(Images, list(X), (list(X),)), (Sample, {"image": X}, ({"image": X},))],
)
def test_one_argument_that_is_a_container(kind, wrong, right) -> None:
    distiller = Distiller(kind(), kind(), structkd.KDLoss()).eval()
    with pytest.raises(Exception, match=r"structkd: .*tuple of arguments") as told:
        distiller(wrong, x_teacher=wrong)
    assert "the teacher" in str(told.value) or "the student" in str(told.value)
    assert distiller(right, x_teacher=right)[1]["KD"].isfinite()


class Boxes(Images):
    """Takes a named tuple whose second tensor may be empty beside a batch."""

    def forward(self, scene: Scene) -> Tensor:  # type: ignore[override]
        assert scene.boxes.shape == (0, 4)
        return self.net(scene.image)


class Scene(NamedTuple):
    image: Tensor
    boxes: Tensor


def test_the_teacher_gets_the_container_that_was_given_and_all_that_is_in_it() -> None:
    distiller = Distiller(Boxes(), Boxes(), structkd.KDLoss())
    scene = Scene(X, torch.zeros(0, 4))
    assert distiller((scene,), x_teacher=(scene,))[1]["KD"] > 0


def test_an_example_of_two_arguments() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.side = nn.Linear(3, 10), nn.Linear(2, 3)

        def forward(self, x: Tensor, meta: Tensor) -> Tensor:
            return self.fc(x.mean((2, 3)) + self.side(meta))

    meta = torch.randn(4, 2)
    layers = {"embedding": "fc:input"}
    with pytest.raises(TypeError, match=r"example=\(\(x, meta\), \(x, meta\)\)"):
        Distiller(Two(), Two(), "CORALLoss", example=(X, meta), layers=layers)
    given = (X, meta)
    distiller = Distiller(Two(), Two(), "CORALLoss", example=(given, given), layers=layers)
    assert distiller(given, x_teacher=given)[1]["CORAL"].isfinite()


@pytest.mark.parametrize(
    ("x", "x_teacher", "network"),
    [
        (X[:, :1], X, "student"),
        (X, X[:, :1], "teacher"),
        (X.double(), X, "student"),
        (X, X.double(), "teacher"),
    ],
)
def test_torchs_raw_words_say_which_network_failed_and_on_what(x, x_teacher, network) -> None:
    distiller = Distiller(net(4), net(6), structkd.KDLoss())
    failed = x if network == "student" else x_teacher
    kind = "float64" if failed.dtype == torch.float64 else "float32"
    shape = ", ".join(map(str, failed.shape))
    with pytest.raises(RuntimeError, match=rf"this came from the {network}.*{kind} \({shape}\)"):
        distiller(x, x_teacher=x_teacher)


def test_criterions_parameters_that_no_optimizer_moves_are_told() -> None:
    distiller = Distiller(net(4), net(6), "FitNetLoss", layers={"intermediate": "2"})

    def epoch(optimizer: torch.optim.Optimizer) -> None:
        for _ in range(2):
            output, terms = distiller(X, x_teacher=X)
            optimizer.zero_grad()
            (output.square().mean() + sum(terms.values())).backward()
            optimizer.step()
        distiller.step_epoch()

    student_alone = torch.optim.SGD(distiller.student.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=r"no optimizer updates the parameters of FitNetLoss"):
        epoch(student_alone)
    whole = torch.optim.SGD(distiller.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        epoch(whole)
        distiller.step_epoch()  # nothing was trained since
        whole.zero_grad()
        for _ in range(2):  # a warm-up by the labels alone
            output, _ = distiller(X, x_teacher=X)
            output.square().mean().backward()
            whole.step()
        distiller.step_epoch()


def test_a_teacher_of_other_classes_is_told_when_it_is_made() -> None:
    student, teacher = (timm.create_model("resnet10t", num_classes=n) for n in (10, 7))
    with pytest.raises(ValueError, match=r"same classes.*10 and 7"):
        Distiller(student, teacher, structkd.KDLoss())
    assert Distiller(student, teacher, structkd.CORALLoss())


def test_probabilities_where_logits_are_read_are_told() -> None:
    class Soft(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).softmax(dim=1)

    with pytest.raises(ValueError, match=r"teacher\.logits look like probabilities"):
        Distiller(net(4), Soft(), structkd.KDLoss())(X, x_teacher=X)
    shares = Distiller(Soft(), Soft(), structkd.LogitMSELoss())  # of land cover, say
    assert shares(X, x_teacher=X)[1]["Logits"] > 0


def _wrapped(rank: int, out: str) -> None:
    said = []
    for module in (
        Distiller(net(4), net(6), "FitNetLoss", layers={"intermediate": "2"}),
        structkd.FitNetLoss(),
    ):
        try:
            DistributedDataParallel(module)
        except RuntimeError as error:
            said.append(str(error))
    torch.save(said, f"{out}.{rank}")


def test_processes_need_a_shape_before_they_are_wrapped(tmp_path: Path) -> None:
    start(_wrapped, tmp_path, 1, str(tmp_path / "said"))
    whole, criterion = torch.load(tmp_path / "said.0", weights_only=True)
    assert "example=x" in whole
    assert "FitNetLoss" in criterion
    assert "torch.no_grad()" in criterion


def _sharded(rank: int, out: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    said = []
    for part in ("whole", "a layer"):
        student = Odd(4)
        fully_shard(student if part == "whole" else student.zwei, mesh=mesh)
        try:
            Distiller(student, Odd(8), "FitNetLoss", layers={"intermediate": "zwei"})
            said.append("nothing")
        except TypeError as error:
            said.append(str(error))
        assert Distiller(student, Odd(8), "KDLoss")  # trains nothing of its own
    torch.manual_seed(0)
    distiller = Distiller(Odd(4), Odd(8), "FitNetLoss", layers={"intermediate": "zwei"}, example=X)
    fully_shard(distiller.student.zwei, mesh=mesh)
    fully_shard(distiller, mesh=mesh)
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1)
    rows = slice(2 * rank, 2 * rank + 2)
    for _ in range(3):
        output, terms = distiller(X[rows], x_teacher=X[rows])
        (output.square().mean() + sum(terms.values())).backward()
        optimizer.step()
        optimizer.zero_grad()
    weight = distiller.criterion.regressor.conv.weight.full_tensor().detach()
    torch.save([said, weight], f"{out}.{rank}")


@pytest.mark.slow
def test_a_student_that_is_sharded_alone_is_refused_and_the_whole_is_right(tmp_path: Path) -> None:
    start(_sharded, tmp_path, 2, str(tmp_path / "out"))
    torch.manual_seed(0)
    plain = Distiller(Odd(4), Odd(8), "FitNetLoss", layers={"intermediate": "zwei"}, example=X)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(3):
        output, terms = plain(X, x_teacher=X)
        (output.square().mean() + sum(terms.values())).backward()
        optimizer.step()
        optimizer.zero_grad()
    for rank in range(2):
        said, weight = torch.load(f"{tmp_path / 'out'}.{rank}", weights_only=True)
        assert all("fully_shard(distiller)" in words for words in said)
        torch.testing.assert_close(weight, plain.criterion.regressor.conv.weight.detach())


def test_the_loop_of_the_first_screen_with_a_gradient_that_is_right() -> None:
    """The labels' loss is the loop's, and the factor is a number beside the terms."""
    distiller = Distiller(net(4), net(6), 2 * structkd.KDLoss()).eval()
    target = torch.tensor([1, -100, 3, 4])
    output, terms = distiller(X, target, x_teacher=X)
    task = F.cross_entropy(output, target, ignore_index=-100)
    (task + structkd.falling(1, 2) * sum(terms.values())).backward()
    got = distiller.student[0].weight.grad.clone()
    distiller.zero_grad()
    logits = distiller.student(X)
    with torch.no_grad():
        wanted_t = distiller.teacher(X)
    (F.cross_entropy(logits, target) + structkd.KDLoss()(logits, wanted_t)).backward()
    torch.testing.assert_close(got, distiller.student[0].weight.grad)
