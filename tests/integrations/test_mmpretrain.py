"""mmengine's Runner and mmpretrain's configs with structkd's classifier in them."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mmpretrain.registry
import pytest
import torch
import torch.nn.functional as F
from mmengine.logging import HistoryBuffer
from mmpretrain.structures import DataSample
from torch import nn

import structkd
from structkd.integrations.mmpretrain import MODELS, DistilledClassifier, default_layers
from tests.integrations import folders, mm_flow
from tests.integrations.scheduled import Scheduled

MODELS.register_module(module=Scheduled)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.write(tmp_path_factory.mktemp("images"))


def _resnet(**head: Any) -> dict[str, Any]:
    backbone = {"type": "ResNet_CIFAR", "depth": 18, "base_channels": 8, "stem_channels": 8}
    return {
        "type": "ImageClassifier",
        "backbone": backbone,
        "neck": {"type": "GlobalAveragePooling"},
        "head": {"type": "LinearClsHead", "num_classes": 4, "in_channels": 64, **head},
    }


def _net(config: dict[str, Any], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    net: nn.Module = mmpretrain.registry.MODELS.build(config)
    return net


def _samples(count: int = 8) -> list[DataSample]:
    samples = [DataSample(metainfo={"sample_idx": 3 * n}) for n in range(count)]
    return [sample.set_gt_label(n % 4) for n, sample in enumerate(samples)]


def _model(distill: Any, **options: Any) -> DistilledClassifier:
    student = options.pop("student", None) or _net(_resnet())
    teacher = options.pop("teacher", None) or _net(_resnet(), seed=1)
    return DistilledClassifier(
        student, teacher, distill, **{"example_size": (3, 32, 32), **options}
    )


def test_a_new_model_allows_its_checkpoints_though_others_took_that_back() -> None:
    # As accelerate does, and torch's own context of safe globals when it ends.
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        _model({"type": "KDLoss"})
        assert HistoryBuffer in torch.serialization.get_safe_globals()
    finally:
        torch.serialization.add_safe_globals(before)


def test_two_epochs_train_validate_and_save_no_teacher(data: Path, tmp_path: Path) -> None:
    cfg = mm_flow.config("three_criteria_cifar10", data, tmp_path)
    runner, logged = mm_flow.train(cfg)
    steps = len(logged["train/loss"]) // 2
    assert sum(logged["train/loss"][steps:]) < sum(logged["train/loss"][:steps])
    assert "val/accuracy/top1" in logged
    parts = [key for key in logged if key.startswith("train/loss_")]
    assert {"train/loss_student", "train/loss_KD", "train/loss_AT", "train/loss_SEM-1"} <= set(
        parts
    )
    for step, total in enumerate(logged["train/loss"]):
        assert total == pytest.approx(sum(logged[key][step] for key in parts), rel=1e-6)

    model = runner.model
    state = mm_flow.saved(tmp_path, 2)["state_dict"]
    student = {f"distiller.student.{name}" for name in model.student.state_dict()}
    criterion = {f"distiller.criterion.{name}" for name in model.distiller.criterion.state_dict()}
    assert criterion
    assert set(state) == student | criterion | {"epoch"}
    before = mm_flow.saved(tmp_path, 1)["state_dict"]
    names = [name for name, _ in model.distiller.criterion.named_parameters()]
    moved = mm_flow.differing(before, state)
    assert {f"distiller.criterion.{name}" for name in names} <= set(moved)
    teacher = torch.load(data / "teacher.pth", weights_only=True)["state_dict"]
    assert mm_flow.differing(teacher, model.distiller.teacher.state_dict()) == []

    bare = _net(
        {
            **_resnet(),
            "init_cfg": {
                "type": "Pretrained",
                "checkpoint": str(tmp_path / "epoch_2.pth"),
                "prefix": "distiller.student.",
            },
        }
    )
    bare.init_weights()
    x = torch.randn(2, 3, 32, 32)
    runner.model.eval()
    # The average that validation used is what mmengine saves as the model.
    loaded = {
        key.removeprefix("distiller.student."): value
        for key, value in state.items()
        if key in student
    }
    assert mm_flow.differing(dict(bare.state_dict()), loaded) == []
    assert bare.eval()(x).shape == (2, 4)


def test_a_resumed_run_goes_on_to_the_bit(data: Path, tmp_path: Path) -> None:
    def run(folder: str, *, cut_off: bool = False, resume: bool = False) -> dict[str, list[float]]:
        cfg = mm_flow.config("three_criteria_cifar10", data, tmp_path / folder, resume=resume)
        cfg.model.distill = [*cfg.model.distill, {"type": "structkd.Scheduled"}]
        return mm_flow.train(cfg, cut_off=cut_off)[1]

    whole = run("whole")
    run("cut", cut_off=True)
    resumed = run("cut", resume=True)
    assert resumed["train/loss"] == whole["train/loss"]
    wanted, got = (mm_flow.saved(tmp_path / folder, 2) for folder in ("whole", "cut"))
    assert mm_flow.differing(wanted["state_dict"], got["state_dict"]) == []
    assert wanted["ema_state_dict"].keys() == got["ema_state_dict"].keys()
    average = (part["ema_state_dict"] for part in (wanted, got))
    assert mm_flow.differing(*average) == []
    ended = [value for key, value in got["ema_state_dict"].items() if key.endswith("ended")]
    assert ended == [1]  # the second epoch is still open


@pytest.mark.parametrize("kind", ["amp", "mixup"])
def test_the_runners_options(data: Path, tmp_path: Path, kind: str) -> None:
    cfg = mm_flow.config("distilled_cifar10", data, tmp_path)
    if kind == "amp":
        cfg.optim_wrapper.update(type="CPUAmpOptimWrapper", clip_grad={"max_norm": 5})
    else:
        cfg.model.student.train_cfg = {"augments": [{"type": "Mixup", "alpha": 0.8}]}
        cfg.model.student.head.loss = {"type": "CrossEntropyLoss", "use_soft": True}
    runner, logged = mm_flow.train(cfg)
    steps = len(logged["train/loss"]) // 2
    assert sum(logged["train/loss"][steps:]) < sum(logged["train/loss"][:steps])
    assert (runner.model.data_preprocessor.batch_augments is not None) == (kind == "mixup")


@pytest.mark.slow
def test_compiled_averaged_and_autocast_at_once(data: Path, tmp_path: Path) -> None:
    cfg = mm_flow.config("three_criteria_cifar10", data, tmp_path)
    cfg.optim_wrapper.update(type="CPUAmpOptimWrapper")
    cfg.compile = {"backend": "eager"}  # what is tested is what Dynamo traces
    torch._dynamo.utils.counters.clear()
    _, logged = mm_flow.train(cfg)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    steps = len(logged["train/loss"]) // 2
    assert sum(logged["train/loss"][steps:]) < sum(logged["train/loss"][:steps])


def test_loss_is_the_plain_loops_to_the_bit() -> None:
    spec = [{"type": "KDLoss"}, {"type": "AttentionTransferLoss"}]
    model = _model(spec).train()
    x, samples = torch.randn(8, 3, 32, 32), _samples()
    losses = model(x, samples, mode="loss")
    total, _ = model.parse_losses(losses)

    class Plain(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.net = _net(_resnet(), seed)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.net(images, mode="tensor")

    layers = {key: f"net.{name}" for key, name in default_layers(_net(_resnet())).items()}
    plain = structkd.Distiller(Plain(0), Plain(1), spec, example=x, layers=layers).train()
    output, terms = plain(x, x_teacher=x)
    target = torch.arange(8) % 4
    # mmpretrain sums and divides where PyTorch takes the mean: the same but for the last bit.
    task_loss = plain.student.net.head.loss_module(output, target, avg_factor=8)
    torch.testing.assert_close(task_loss, F.cross_entropy(output, target))
    wanted = sum([task_loss, *terms.values()])
    assert torch.equal(total, wanted)
    assert list(losses) == ["loss_student", *(f"loss_{name}" for name in terms)]
    total.backward()
    wanted.backward()
    for own, other in zip(model.distiller.parameters(), plain.parameters(), strict=True):
        assert torch.equal(own.grad, other.grad)


def test_modes_predict_and_tensor_are_the_students() -> None:
    model = _model("KDLoss").eval()
    x = torch.randn(2, 3, 32, 32)
    scores = model(x)
    assert torch.equal(scores, model.student(x))
    predicted = model(x, mode="predict")
    assert [int(sample.pred_label) for sample in predicted] == scores.argmax(1).tolist()
    assert model.extract_feat(x)[-1].shape == (2, 64)
    with pytest.raises(RuntimeError, match="Invalid mode"):
        model(x, mode="train")


def test_a_memory_gets_the_index_and_a_criterion_the_labels() -> None:
    seen: list[Any] = []

    class Watch(structkd.Criterion):
        reads = ("logits",)

        def compute(self, student: Any, teacher: Any, target: Any) -> dict[str, torch.Tensor]:
            seen.append((student.index, target))
            return {"watch": student.logits.sum()}

    model = _model(Watch)
    model(torch.randn(4, 3, 32, 32), _samples(4), mode="loss")
    scores = [sample.set_gt_score(torch.full((4,), 0.25)) for sample in _samples(4)]
    soft_loss = {"type": "CrossEntropyLoss", "use_soft": True}
    model.student.head.loss_module = mmpretrain.registry.MODELS.build(soft_loss)
    model(torch.randn(4, 3, 32, 32), scores, mode="loss")
    (index, labels), (_, soft) = seen
    assert index.tolist() == [0, 3, 6, 9]
    assert labels.tolist() == [0, 1, 2, 3]
    assert soft.shape == (4, 4)


def test_the_teachers_input_is_normalised_anew() -> None:
    student, teacher = (
        {**_resnet(), "data_preprocessor": numbers}
        for numbers in (
            {"mean": [10.0, 20.0, 30.0], "std": [2.0, 3.0, 4.0], "to_rgb": True},
            {"mean": [3.0, 2.0, 1.0], "std": [5.0, 6.0, 7.0], "to_rgb": False},
        )
    )
    model = _model("KDLoss", student=_net(student), teacher=_net(teacher, 1))
    raw = {"inputs": torch.randint(0, 256, (2, 3, 32, 32)), "data_samples": _samples(2)}
    wanted = model.distiller.teacher.data_preprocessor(raw)["inputs"]
    seen: list[torch.Tensor] = []
    backbone = model.distiller.teacher.backbone
    backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    own = model.data_preprocessor(raw)
    model(own["inputs"], own["data_samples"], mode="loss")
    torch.testing.assert_close(seen[0], wanted, atol=1e-4, rtol=1e-5)
    model([own["inputs"], own["inputs"] + 1], own["data_samples"], mode="loss")
    assert torch.equal(seen[1], own["inputs"] + 1)


def test_samples_without_a_pair_are_left_out() -> None:
    model = _model("KDLoss").eval()
    x, x_teacher = torch.randn(2, 4, 3, 32, 32)
    samples = _samples(4)
    for sample, paired in zip(samples, [True, False, False, True], strict=True):
        sample.set_metainfo({"paired": paired})
    found = model([x, x_teacher], samples, mode="loss")["loss_KD"]
    wanted = model([x[::3], x_teacher[::3]], _samples(4)[::3], mode="loss")["loss_KD"]
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("labels", [[[0], [], [1, 2], [3]], [[0, 1], [2], [3, 0], [1]]])
def test_several_labels_a_sample_are_no_classes(labels: list[list[int]]) -> None:
    network = _resnet(type="MultiLabelLinearClsHead")
    spec = {"type": "KDLoss", "form": "sigmoid"}
    model = _model(spec, student=_net(network), teacher=_net(network, 1)).eval()
    x = torch.randn(4, 3, 32, 32)
    samples = [one.set_gt_label(some) for one, some in zip(_samples(4), labels, strict=True)]
    samples[0].set_metainfo({"paired": False})
    model(x, samples, mode="loss")
    model.distiller.criterion = structkd.SupervisionLoss()
    with pytest.raises(ValueError, match="needs target"):
        model(x, samples, mode="loss")


def test_pairs_come_through_mmpretrains_preprocessor_of_pairs() -> None:
    numbers = {"mean": [10.0, 20.0, 30.0], "std": [2.0, 3.0, 4.0]}
    teacher = _net({**_resnet(), "data_preprocessor": {**numbers, "to_rgb": False}}, 1)
    pairs = {"type": "SelfSupDataPreprocessor", **numbers, "to_rgb": True}
    model = _model("KDLoss", teacher=teacher, data_preprocessor=pairs).eval()
    raw = torch.randint(0, 256, (2, 4, 3, 32, 32))
    data = model.data_preprocessor({"inputs": list(raw), "data_samples": _samples(4)})
    assert model(**data, mode="loss")["loss_KD"].isfinite()
    own = model.data_preprocessor({"inputs": raw[0], "data_samples": _samples(4)})
    assert len(model(**own, mode="predict")) == 4
    alone = teacher.data_preprocessor({"inputs": raw[0]})["inputs"]
    torch.testing.assert_close(model._renormalise(own["inputs"]), alone, atol=1e-4, rtol=1e-5)


def test_the_hook_lets_the_criterias_weight_fall(data: Path, tmp_path: Path) -> None:
    cfg = mm_flow.config("distilled_cifar10", data, tmp_path)
    cfg.custom_hooks = [{"type": "structkd.FallingWeightHook"}]
    runner, _ = mm_flow.train(cfg)
    assert runner.model.distill_weight == pytest.approx(
        structkd.falling(runner.max_iters - 1, runner.max_iters)
    )
    x, samples = torch.randn(4, 3, 32, 32), _samples(4)
    model = _model("KDLoss").eval()
    whole = model(x, samples, mode="loss")
    model.distill_weight = 0.25
    part = model(x, samples, mode="loss")
    torch.testing.assert_close(part["loss_KD"], 0.25 * whole["loss_KD"])
    torch.testing.assert_close(part["loss_student"], whole["loss_student"])


def test_layer_depths_go_to_the_student() -> None:
    student = _net(
        {
            "type": "ImageClassifier",
            "backbone": {
                "type": "VisionTransformer",
                "arch": "deit-tiny",
                "img_size": 32,
                "patch_size": 16,
            },
            "head": {"type": "VisionTransformerClsHead", "num_classes": 4, "in_channels": 192},
        }
    )
    model = _model("KDLoss", student=student)
    _, depth = student.get_layer_depth("backbone.layers.0.ln1.weight")
    assert model.get_layer_depth("distiller.student.backbone.layers.0.ln1.weight") == (1, depth)
    assert model.get_layer_depth("distiller.criterion.weight") == (depth - 1, depth)


NETWORKS: dict[str, dict[str, Any]] = {
    "timm backbone": {
        "type": "ImageClassifier",
        "backbone": {
            "type": "TIMMBackbone",
            "model_name": "test_resnet",
            "num_classes": 0,
            "global_pool": "",
        },
        "neck": {"type": "GlobalAveragePooling"},
        "head": {"type": "LinearClsHead", "num_classes": 4, "in_channels": 96},
    },
    "timm": {
        "type": "TimmClassifier",
        "model_name": "test_resnet",
        "num_classes": 4,
        "loss": {"type": "CrossEntropyLoss"},
    },
    "convnext": {
        "type": "ImageClassifier",
        "backbone": {
            "type": "ConvNeXt",
            "arch": {"depths": [1, 1, 1, 1], "channels": [8, 8, 16, 16]},
        },
        "head": {"type": "LinearClsHead", "num_classes": 4, "in_channels": 16},
    },
}


@pytest.mark.parametrize("name", NETWORKS)
def test_layers_need_no_name(name: str) -> None:
    student = _net(NETWORKS[name])
    spec = [{"type": "FitNetLoss"}, {"type": "KDLoss"}, {"type": "CorrelationCongruenceLoss"}]
    model = _model(spec, student=student).train()
    losses = model(torch.randn(8, 3, 32, 32), _samples(), mode="loss")
    total, _ = model.parse_losses(losses)
    total.backward()
    assert all(torch.isfinite(value) for value in losses.values())
    assert all(parameter.grad is not None for parameter in model.distiller.criterion.parameters())


def test_registries_keep_their_own_names() -> None:
    theirs = mmpretrain.registry.MODELS.get("CrossCorrelationLoss")
    assert theirs.__module__.startswith("mmpretrain.")
    assert (
        mmpretrain.registry.MODELS.get("structkd.CrossCorrelationLoss")
        is structkd.CrossCorrelationLoss
    )
    assert MODELS.get("DistilledClassifier") is DistilledClassifier
    built = mmpretrain.registry.MODELS.build({"type": "structkd.KDLoss", "temperature": 2.0})
    assert isinstance(built, structkd.KDLoss)


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """Serves ``tmp_path`` over HTTP."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_teachers_config_needs_weights(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(ValueError, match=r"teacher has no weights.*teacher_checkpoint"):
        _model("KDLoss", teacher=_resnet())
    path = str(tmp_path / "teacher.pth")
    torch.save(_net(_resnet(), seed=1).state_dict(), path)
    for options in ({"teacher_checkpoint": path}, {"teacher_checkpoint": f"{url}/teacher.pth"}):
        model = _model("KDLoss", teacher=_resnet(), **options)
        wanted = _net(_resnet(), seed=1).state_dict()
        assert mm_flow.differing(dict(model.distiller.teacher.state_dict()), dict(wanted)) == []
    model = _model("KDLoss", teacher={**_resnet(), "pretrained": path})
    assert mm_flow.differing(dict(model.distiller.teacher.state_dict()), dict(wanted)) == []
    with pytest.raises(ValueError, match=r"(?s)does not fit.*head\.fc"):
        _model("KDLoss", teacher=_resnet(num_classes=7), teacher_checkpoint=path)


def _wrong(kind: str) -> Any:
    x, samples = torch.randn(8, 3, 32, 32), _samples()
    if kind == "classes":
        return _model("KDLoss", teacher=_net(_resnet(num_classes=7)))(x, samples, mode="loss")
    if kind == "layer":
        return _model("AttentionTransferLoss", layers={"intermediate": "backbone.layer33"})
    if kind == "criterion":
        return _model({"type": "KDLos"})
    if kind == "option":
        return _model({"type": "KDLoss", "temprature": 1})
    if kind == "no type":
        return _model("KDLoss", student={"backbone": {}})
    if kind == "no config":
        return _model("KDLoss", student="resnet18")
    if kind == "no classifier":
        return _model("KDLoss", student={"type": "ResNet_CIFAR", "depth": 18})
    if kind == "no samples":
        return _model("KDLoss")(x, mode="loss")
    return _model("KDLoss")([x, x, x], samples, mode="loss")


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("classes", ValueError, "logits must have one width, got 4 and 7.*same classes"),
        ("layer", ValueError, r"'backbone\.layer33' is no layer.*layer3"),
        ("criterion", ValueError, "'KDLos' is no criterion.*KDLoss"),
        ("option", TypeError, "no option 'temprature'.*temperature"),
        ("no type", ValueError, "student's config has no type"),
        ("no config", TypeError, "student must be a classifier's config"),
        ("no classifier", TypeError, "must be an mmpretrain classifier, got a ResNet_CIFAR"),
        ("no samples", ValueError, "data_samples are missing.*PackInputs"),
        ("triple", ValueError, "the mask of rows that have a pair must be bool"),
    ],
)
def test_bad_input_says_what_to_do(kind: str, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        _wrong(kind)
