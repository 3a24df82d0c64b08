"""A distillation task for timm's training loop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from structkd._checks import describe, whole
from structkd.criteria import Spec
from structkd.distiller import Distiller, falling
from structkd.integrations._extra import missing_extra
from structkd.integrations._images import images_of_both

try:
    from timm.task import FeatureDistillationTask
    from timm.utils import unwrap_model
except ImportError as error:
    raise missing_extra("timm", ImportError(f"timm>=1.0.27: {error}")) from error

TrainableT = TypeVar("TrainableT", bound="TrainableDistiller")
DEFAULT_SPEC: Mapping[str, Any] = {"type": "DSLoss"}
_logger = logging.getLogger(__name__)


class TrainableDistiller(Distiller):
    """A Distiller that counts epochs itself, for loops that do not call ``step_epoch``.

    timm's script calls ``train()`` once at the beginning of each epoch, so a call of ``train()``
    after a training step ends the criterion's epoch.
    """

    epoch = 0  # epochs that are over
    epoch_open = False  # whether a step was made since the criterion's last epoch ended

    def train(self: TrainableT, mode: bool = True) -> TrainableT:
        """Sets the mode, and ends the criterion's epoch where one is open and another begins."""
        if mode and self.epoch_open:
            self.step_epoch()
            self.epoch += 1
            self.epoch_open = False
        super().train(mode)
        return self


class DistillationTask(FeatureDistillationTask):  # type: ignore[misc]
    """A ``timm.task`` task that distils with any criterion of structkd.

    It takes the arguments of timm's ``FeatureDistillationTask`` and works as that does in timm's
    loop: ``get_trainable_module()`` has the student's and the criterion's parameters for the
    optimizer, weight-decay rules, clipping, EMA and DDP; ``get_eval_model()`` is the student;
    ``get_checkpoint_state()`` holds the student's weights under ``state_dict``, the criterion's
    parameters and memories under ``task_state``, and nothing of the teacher.

    The loss is ``task_loss_weight * task loss + distill_loss_weight * sum of the terms``, both 1 by
    default; with ``task_loss_weight`` alone the other is its complement, as in timm. With
    ``falling_epochs`` the terms have a weight beside it that falls from 1 to 0 over so many epochs,
    :func:`structkd.falling`, so that the end of the training is left to the labels.

    Args:
        student_model: The network to train, with timm's ``pretrained_cfg``.
        teacher_model: A timm model's name, a module, or timm's ``DistillationTeacher``.
        criterion: The task loss, cross-entropy by default.
        distill: What :class:`structkd.Distiller` takes as its criterion.
        layers: What to capture of both networks; optional, as on all timm models.
        teacher_layers: The same for the teacher, where its layers have other names.
        example: Input of the student, or a pair (the student's, the teacher's), from which a
            criterion reads widths. By default two blank images of the sizes in each network's
            ``pretrained_cfg``.
        falling_epochs: Epochs of the training, over which the terms' weight falls to 0; None keeps
            it constant.
        **options: Further options of timm's ``FeatureDistillationTask``: ``distill_loss_weight``,
            ``task_loss_weight``, ``teacher_pretrained_path``, ``device``, ``dtype`` and others.

    Shape:
        ``task(input, target)``: input one image batch ``(B, C, H, W)`` normalised for the student,
        which is normalised anew for the teacher as timm does; or a pair (the student's, the
        teacher's) of the same samples, each normalised for its own network; or a triple with a mask
        ``(B,)`` bool of the rows that have a pair, beside which the teacher's images do not count.
        Target as the task
        loss takes it. Output a dict: ``loss``, ``output`` (the student's logits), ``task_loss``,
        ``kd_loss`` (the sum of the terms, without ``distill_loss_weight``), and every term by its
        name.

    Raises:
        ValueError: If the student has no ``pretrained_cfg``, the input is neither a batch nor a
            pair, or as :class:`structkd.Distiller` raises.

    Example:
        >>> import timm
        >>> student = timm.create_model("test_resnet", num_classes=10)
        >>> teacher = timm.create_model("test_vit", num_classes=10)
        >>> task = DistillationTask(student, teacher, distill=[
        ...     dict(type="KDLoss", temperature=2.0), dict(type="FitNetLoss", weight=0.5)],
        ...     verbose=False)
        >>> task.train()(torch.randn(2, 3, 160, 160), torch.tensor([1, 2])).keys()
        dict_keys(['loss', 'output', 'task_loss', 'kd_loss', 'KD', 'FitNets'])
    """

    def __init__(
        self,
        student_model: nn.Module,
        teacher_model: str | nn.Module,
        criterion: nn.Module | Callable[..., Tensor] | None = None,
        *,
        distill: Spec = DEFAULT_SPEC,
        layers: Mapping[str, Any] | None = None,
        teacher_layers: Mapping[str, Any] | None = None,
        example: Any = None,
        falling_epochs: int | None = None,
        **options: Any,
    ) -> None:
        self.falling_epochs = (
            None if falling_epochs is None else whole("falling_epochs", falling_epochs)
        )
        _check_student(student_model, teacher_model)
        options["dtype"] = options.get("dtype") or next(student_model.parameters()).dtype
        # Equal widths, so that timm adds no projection: the criterion has its own.
        options |= {"student_feature_dim": 1, "teacher_feature_dim": 1}
        verbose = options.pop("verbose", True)
        super().__init__(student_model, teacher_model, criterion, verbose=False, **options)
        self.verbose = verbose
        # Out of the submodules: the Distiller owns the teacher, and no state_dict holds it.
        wrapper = self._modules.pop("teacher")
        self.register_buffer("teacher_mean", wrapper.mean_kd, persistent=False)
        self.register_buffer("teacher_std", wrapper.std_kd, persistent=False)
        # Asked once: on an accelerator torch.equal waits for the device.
        self.renormalises = self.student_mean.shape == self.teacher_mean.shape and not (
            torch.equal(self.student_mean, self.teacher_mean)
            and torch.equal(self.student_std, self.teacher_std)
        )
        self.trainable_module = TrainableDistiller(
            student_model,
            wrapper.model,
            distill,
            example=_blank(student_model, wrapper.model) if example is None else example,
            layers=layers,
            teacher_layers=teacher_layers,
        )
        if verbose:
            _logger.info(
                "structkd: %s; task_loss_weight=%s, distill_loss_weight=%s",
                self.distiller.criterion,
                self.task_loss_weight,
                self.distill_loss_weight,
            )

    @property
    def distiller(self) -> TrainableDistiller:
        """The Distiller inside DDP's and ``torch.compile``'s wrappers."""
        inner: TrainableDistiller = unwrap_model(self.trainable_module)
        return inner

    @property
    def teacher(self) -> nn.Module:
        """The frozen teacher, which is no submodule."""
        return self.distiller.teacher

    def compile(
        self, backend: str = "inductor", mode: str | None = None, **compile_kwargs: Any
    ) -> nn.Module:
        """Compiles the Distiller for training and the student for validation, and returns that."""
        settings: dict[str, Any] = {"backend": backend, "mode": mode, **compile_kwargs}
        compiled: Callable[..., Any] = torch.compile
        student: nn.Module = compiled(self.distiller.student, **settings)
        self.eval_model = student
        self.trainable_module = compiled(self.trainable_module, **settings)
        return student

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> Any:
        """Returns the student, the EMA's or the compiled one where asked for."""
        found = super().get_eval_model(module=module, ema=ema)
        inner = None if found is None else unwrap_model(found)
        return inner.student if isinstance(inner, TrainableDistiller) else found

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        """Returns the student's parameters, without its last two if asked, and the criterion's."""
        student = list(self.distiller.student.parameters())
        return student[: -2 if exclude_head else None] + list(self.distiller.criterion.parameters())

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """Returns the criterion's parameters and memories, and whether its epoch is open."""
        module = self.get_trainable_module(ema=ema) if module is None else module
        if module is None:
            return {}
        inner: TrainableDistiller = unwrap_model(module)
        return {
            "criterion": inner.criterion.state_dict(),
            "epoch": inner.epoch,
            "epoch_open": inner.epoch_open,
        }

    def load_task_state(
        self,
        state: dict[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        """Loads what :meth:`get_task_state` returned.

        Raises:
            RuntimeError: If the checkpoint has no state for a criterion that needs some.
        """
        module = self.get_trainable_module(ema=ema) if module is None else module
        if module is None:
            raise RuntimeError("there is no EMA to load a state into: call setup_ema() first")
        inner: TrainableDistiller = unwrap_model(module)
        held = (state or {}).get("criterion")
        if held is None:
            if strict and inner.criterion.state_dict():
                raise RuntimeError(
                    "the checkpoint holds no state of the criterion, whose parameters or memories "
                    "would start anew: resume one that this task saved, or begin from these "
                    "weights (--initial-checkpoint in timm's script)"
                )
            return
        inner.criterion.load_state_dict(held, strict=strict)
        inner.epoch = int((state or {}).get("epoch", 0))
        inner.epoch_open = bool((state or {}).get("epoch_open", False))

    def forward(self, input: Any, target: Tensor, index: Tensor | None = None) -> dict[str, Tensor]:
        """Runs both networks; returns the loss and its parts.

        Args:
            input: A batch, a pair (the student's, the teacher's), or a triple with a mask.
            target: What the task loss takes; a criterion that reads labels gets it too.
            index: Positions of the samples in the data set ``(B,)``, for criteria with a memory.
        """
        x, x_teacher, paired = images_of_both(
            input,
            self._renormalised,
            "the loader must yield (image, target), ((student's image, teacher's image), target) "
            "or ((student's, teacher's, whether they are a pair), target)",
        )
        output, terms = self.trainable_module(
            x, target, x_teacher=x_teacher, paired=paired, index=index
        )
        if torch.is_grad_enabled():
            self.distiller.epoch_open = True
        task_loss = self.criterion(output, target)
        kd_loss = sum(terms.values())
        weight = self.distill_loss_weight
        if self.falling_epochs is not None:
            weight *= falling(self.distiller.epoch, self.falling_epochs)
        loss = self.task_loss_weight * task_loss + weight * kd_loss
        parts = {"loss": loss, "output": output, "task_loss": task_loss, "kd_loss": kd_loss}
        return {**parts, **terms}

    def _renormalised(self, images: Tensor) -> Tensor:
        if not self.renormalises:
            return images
        unit = images * self.student_std + self.student_mean
        renormalised: Tensor = (unit - self.teacher_mean) / self.teacher_std
        return renormalised


def _check_student(student: object, teacher: object) -> None:
    if not isinstance(student, nn.Module):
        raise TypeError(f"student_model must be an nn.Module, got {describe(student)}")
    wanted = {"pretrained_cfg": "dict(mean=..., std=..., input_size=(3, 224, 224))"}
    if isinstance(teacher, str):
        wanted |= {"num_classes": "10", "in_chans": "3"}
    inner = unwrap_model(student)
    for name, example in wanted.items():
        if not hasattr(inner, name):
            raise ValueError(
                f"student_model, a {type(inner).__name__}, has no {name}, which timm's tasks read: "
                f"set student_model.{name} = {example} to what it is trained with"
            )
    for name in ("mean", "std"):
        if name not in inner.pretrained_cfg:
            raise ValueError(
                f"student_model.pretrained_cfg has no {name!r}, by which its input is normalised"
            )


def _blank(*networks: nn.Module) -> tuple[Tensor, ...]:
    """Returns two blank images for each network, of the size that it states."""
    images = []
    for network in networks:
        inner = unwrap_model(network)
        channels, height, width = getattr(inner, "pretrained_cfg", {}).get(
            "input_size", (3, 224, 224)
        )
        # Transformers and mixers hold the size that they were made for in their patch embedding.
        stated = (getattr(part, "img_size", None) for part in inner.modules())
        size = next((found for found in stated if isinstance(found, tuple)), (height, width))
        probe = next(inner.parameters())
        shape = (2, getattr(inner, "in_chans", channels), *size)
        images.append(torch.zeros(shape, device=probe.device, dtype=probe.dtype))
    return tuple(images)
