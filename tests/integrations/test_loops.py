"""The example files that the docs show, run as they are on small images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from lightning.pytorch import Callback, seed_everything
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, ResNetConfig

from integrations import accelerate_loop, hf_trainer, lightning_module, timm_task
from tests.integrations import folders


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.write(tmp_path_factory.mktemp("images"))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Makes the networks of the examples small, and lets them write where nobody minds."""
    real = timm.create_model

    def create(name: str, **options: Any) -> torch.nn.Module:
        torch.manual_seed(len(name) + int(name[-2:]))
        return real("test_resnet", **options)

    monkeypatch.setattr(timm, "create_model", create)
    monkeypatch.chdir(tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    torch.manual_seed(5)
    path = tmp_path / "teacher.pth"
    torch.save(timm.create_model("resnet34", num_classes=4).state_dict(), path)
    return path


def _fell(losses: list[float]) -> bool:
    half = len(losses) // 2
    return sum(losses[half:]) < sum(losses[:half])


def test_timm(data: Path, teacher: Path) -> None:
    state = torch.load(teacher, weights_only=True)
    state |= {name: torch.zeros(10, *state[name].shape[1:]) for name in ("fc.weight", "fc.bias")}
    torch.save(state, teacher)
    assert _fell(timm_task.main(str(data), str(teacher), size=32, batch_size=16, epochs=2))
    saved = torch.load("student.pth", weights_only=True)
    assert set(saved["state_dict"]) == set(state)
    assert not any("teacher" in key for part in saved.values() for key in part)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "16-true"])
def test_lightning(data: Path, teacher: Path, precision: str) -> None:
    seed_everything(0)
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    options |= {"max_epochs": 2, "enable_model_summary": False, "enable_checkpointing": False}
    trainer, module = lightning_module.main(str(data), str(teacher), precision, 16, **options)
    assert 0 <= trainer.callback_metrics["accuracy"] <= 1
    assert torch.isfinite(trainer.callback_metrics["loss"])
    half = {"bf16-true": torch.bfloat16, "16-true": torch.float16}.get(precision, torch.float32)
    distiller = module.distiller
    for network in (distiller.student, distiller.teacher):
        assert {parameter.dtype for parameter in network.parameters()} == {half}
    assert {parameter.dtype for parameter in distiller.criterion.parameters()} == {torch.float32}
    trainer.save_checkpoint("last.ckpt")
    names = set(torch.load("last.ckpt", weights_only=True)["state_dict"])
    assert names == {f"distiller.{name}" for name in distiller.state_dict()}
    assert not any("teacher" in name for name in names)


def test_lightning_clips_by_the_filter(data: Path, teacher: Path) -> None:
    shares = []

    class Watch(Callback):
        def on_train_start(self, trainer, module) -> None:
            parameters = module.distiller.student.parameters()
            stem = next(parameter for parameter in parameters if parameter.dim() == 4)

            def seen(*_: object) -> None:
                norms = (part.detach().flatten(1).norm(dim=1) for part in (stem.grad, stem))
                shares.append(float(torch.div(*norms).max()))

            trainer.optimizers[0].register_step_post_hook(seen)

        def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
            for parameter in module.distiller.parameters():
                parameter.grad.mul_(1e3)

    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    options |= {"max_steps": 1, "enable_model_summary": False, "enable_checkpointing": False}
    lightning_module.main(str(data), str(teacher), batch_size=16, callbacks=[Watch()], **options)
    assert len(shares) == 1
    assert shares[0] < 0.11  # a tenth, of the filter before the step


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(data: Path, teacher: Path, precision: str) -> None:
    seed_everything(0)
    accelerator, distiller, losses = accelerate_loop.main(
        str(data), str(teacher), precision, epochs=2, batch_size=16, cpu=True
    )
    assert _fell(losses)
    accelerator.save_state("checkpoint", safe_serialization=False)
    (path,) = Path("checkpoint").glob("*model*")
    state = torch.load(path, weights_only=True)
    assert set(state) == set(accelerator.unwrap_model(distiller).state_dict())
    assert not any("teacher" in name for name in state)
    accelerator.load_state("checkpoint")


def test_transformers(data: Path) -> None:
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24], depths=[1, 1, 1], layer_type="basic",
        num_labels=4,
    )  # fmt: skip
    seed_everything(0)
    AutoModelForImageClassification.from_config(config).save_pretrained("teacher")
    options = {"use_cpu": True, "num_train_epochs": 2, "per_device_train_batch_size": 8}
    options |= {"logging_steps": 1, "disable_tqdm": True}

    trainer, distiller = hf_trainer.main(str(data), "teacher", config, **options)
    steps = trainer.state.log_history
    assert _fell([step["loss"] for step in steps if "loss" in step])
    assert 0 <= steps[-2]["eval_accuracy"] <= 1
    optimised = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimised == {id(parameter) for parameter in distiller.parameters()}
    assert list(distiller.criterion.parameters())

    first, last = (Path(f"runs/checkpoint-{step}") for step in (4, 8))
    saved = load_file(last / "model.safetensors")
    assert set(saved) == set(distiller.state_dict())
    _, resumed = hf_trainer.main(str(data), "teacher", config, resume=str(first), **options)
    torch.testing.assert_close(dict(resumed.state_dict()), saved)
    resumed.student.save_pretrained("student")
    again = AutoModelForImageClassification.from_pretrained("student")
    torch.testing.assert_close(again.state_dict(), resumed.student.state_dict())
