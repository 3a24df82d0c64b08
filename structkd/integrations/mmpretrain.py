"""A classifier for mmpretrain's configs that distils a frozen teacher into an ordinary one.

Importing this module, ``custom_imports=dict(imports=["structkd.integrations.mmpretrain"])`` in a
config, registers :class:`DistilledClassifier` and every criterion in mmengine's registries in the
scope ``structkd``, and allows ``torch.load`` the plain classes that mmengine keeps in its
checkpoints, without which PyTorch 2.6 and later cannot resume them.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from structkd._checks import describe
from structkd.criteria import CRITERIA, Spec
from structkd.criteria.base import Criterion, same_buffers
from structkd.distiller import Distiller, falling
from structkd.integrations._extra import missing_extra
from structkd.integrations._images import images_of_both, rows_of
from structkd.integrations._mm_stated import (
    Renormalise,
    default_layers,
    index_of,
    labels_of,
    names_weights,
    pairs_of,
    stated_size,
)

try:
    import mmpretrain.models  # noqa: F401  (fills mmpretrain's registries)
    from mmengine.hooks import Hook
    from mmengine.logging import HistoryBuffer, MessageHub
    from mmengine.model import is_model_wrapper
    from mmengine.registry import HOOKS as ROOT_HOOKS
    from mmengine.registry import MODELS as ROOT
    from mmengine.registry import Registry
    from mmengine.runner.checkpoint import CheckpointLoader
    from mmpretrain.models.classifiers import BaseClassifier
    from mmpretrain.registry import MODELS as CLASSIFIERS
except ImportError as error:
    raise missing_extra("mmpretrain", error) from error

__all__ = ["HOOKS", "MODELS", "DistilledClassifier", "FallingWeightHook", "default_layers"]

MODELS = Registry("model", parent=ROOT, scope="structkd", locations=[__name__])
HOOKS = Registry("hook", parent=ROOT_HOOKS, scope="structkd", locations=[__name__])
for _name, _criterion in CRITERIA.items():
    MODELS.register_module(name=_name, module=_criterion)


def _statistic(owner: object, name: str) -> object:
    """Does for mmengine's log what ``getattr`` does in its checkpoints, and nothing else."""
    if owner is not HistoryBuffer or name not in ("min", "max", "mean", "current"):
        raise pickle.UnpicklingError(f"a checkpoint asks for {name!r} of {owner!r}")
    return getattr(owner, name)


def _allow_checkpoints() -> None:
    """Tells ``torch.load`` of what mmengine's checkpoints hold: its log of smoothed numbers."""
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 6):
        return  # it read all
    plain: list[Any] = [HistoryBuffer, np.ndarray, np.dtype]
    plain += [np.dtypes.Float64DType, np.dtypes.Float32DType, np.dtypes.Int64DType]
    # Their functions have moved within numpy, so ask an array and a number for them.
    plain += [np.zeros(1).__reduce__()[0], np.float64(0).__reduce__()[0]]
    plain += [(_statistic, f"{module}.getattr") for module in ("builtins", "__builtin__")]
    torch.serialization.add_safe_globals(plain)


_allow_checkpoints()


@MODELS.register_module()
class DistilledClassifier(BaseClassifier):  # type: ignore[misc]
    """An mmpretrain classifier that a frozen teacher helps to train.

    The modes ``predict`` and ``tensor`` are the student's own. In mode ``loss`` the student's
    losses come back with the criteria's terms, every one under a name that begins with ``loss_``,
    so that mmengine optimises and logs them; the student's own ``loss`` is called ``loss_student``,
    and the log's ``loss`` is the sum of all.

    A checkpoint holds the student under ``distiller.student.``, the criteria's parameters and
    memories under ``distiller.criterion.``, and nothing of the teacher. mmengine's
    ``init_cfg=dict(type="Pretrained", checkpoint=..., prefix="distiller.student.")`` loads the
    student alone.

    Your own criterion can be used in a config once it is registered,
    ``@structkd.integrations.mmpretrain.MODELS.register_module()``.

    If only some samples of a batch have a pair, set each data sample's ``paired`` to True or False;
    the teacher's images of the others do not count. :class:`FallingWeightHook` lets the criteria's
    weight fall over the training.

    Criteria with a memory get mmpretrain's ``sample_idx``. A criterion's epoch ends when mmengine's
    epoch does; loops that count iterations have none.

    Args:
        student: The config of an mmpretrain classifier, or the classifier.
        teacher: The same for the teacher.
        distill: What :class:`structkd.Distiller` takes as its criterion, such as
            ``[dict(type="DSLoss"), dict(type="KDLoss", weight=0.5)]``.
        teacher_checkpoint: Path or URL of the teacher's weights. Optional where the teacher's
            config names them (``pretrained`` or ``init_cfg``).
        layers: What to capture of both networks; where a part is left out: the classifier's
            scores, the input of its last linear layer, the last stage of the backbone but one.
        teacher_layers: The same for the teacher, where its layers have other names.
        example_size: Channels, height and width of the blank images from which a criterion reads
            widths. By default the size in the student's config, or 224 by 224.
        data_preprocessor: As in mmpretrain; the student's by default. Where the teacher has
            one that normalises otherwise, its input is normalised anew.
        train_cfg: mmpretrain's batch augmentations, as in its ``ImageClassifier``.
        init_cfg: mmengine's; the student's own is followed in any case.

    Shape:
        inputs ``(B, C, H, W)``, or in mode ``loss`` a pair (the student's, the teacher's), as
        mmpretrain's ``SelfSupDataPreprocessor`` gives them; data samples a list of ``DataSample``.

    Raises:
        ValueError: If the teacher has no weights or they do not fit, or as
            :class:`structkd.Distiller` raises.
        TypeError: If student or teacher is neither a config nor a classifier.
    """

    def __init__(
        self,
        student: dict[str, Any] | nn.Module,
        teacher: dict[str, Any] | nn.Module,
        distill: Spec,
        teacher_checkpoint: str | None = None,
        layers: Mapping[str, Any] | None = None,
        teacher_layers: Mapping[str, Any] | None = None,
        example_size: Sequence[int] | None = None,
        data_preprocessor: dict[str, Any] | nn.Module | None = None,
        train_cfg: dict[str, Any] | None = None,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        _allow_checkpoints()  # again: what loads in the meantime may take some of it back
        student_net = _built("student", student)
        if train_cfg is None and isinstance(student, Mapping):
            train_cfg = student.get("train_cfg")  # its Mixup, which a preprocessor of ours does
        super().__init__(init_cfg, _preprocessor(data_preprocessor, train_cfg, student_net))
        teacher_net = _teacher(teacher, teacher_checkpoint)
        sizes = [tuple(example_size or stated_size(net)) for net in (student_net, teacher_net)]
        images = [{"inputs": torch.zeros((2, *size)), "mode": "tensor"} for size in sizes]
        self.distiller = Distiller(
            student_net,
            teacher_net,
            _registered(distill),
            example=tuple(images),
            layers={**default_layers(student_net), **(layers or {})},
            teacher_layers={
                **default_layers(teacher_net),
                **((layers if teacher_layers is None else teacher_layers) or {}),
            },
        )
        self._renormalise = Renormalise(self.data_preprocessor, teacher_net)
        # The epoch that is being trained, so that its end is seen once, after a resume too.
        self.register_buffer("epoch", torch.tensor(-1))
        self._epoch: int | None = None
        self.distill_weight = 1.0  # beside the criteria's own; FallingWeightHook sets it

    @property
    def student(self) -> Any:
        """The student, as it was built."""
        return self.distiller.student

    @property
    def with_head(self) -> bool:
        """Whether the student has a head, as mmpretrain asks."""
        return getattr(self.student, "head", None) is not None

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        # DistributedDataParallel reads this name: it broadcasts all other buffers at every step.
        return same_buffers(self)

    def init_weights(self) -> None:
        """Initialises the student as mmengine does, which does not look inside a Distiller."""
        super().init_weights()
        initialise = getattr(self.student, "init_weights", None)
        if callable(initialise):
            initialise()

    def forward(self, inputs: Any, data_samples: Any = None, mode: str = "tensor") -> Any:
        """Does what mmpretrain's classifiers do in the modes ``loss``, ``predict``, ``tensor``."""
        if mode == "loss":
            return self.loss(inputs, data_samples)
        return self.student(inputs, data_samples, mode=mode)

    def extract_feat(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the student's features."""
        return self.student.extract_feat(*args, **kwargs)

    def loss(self, inputs: Any, data_samples: Any) -> dict[str, Tensor]:
        """Returns the student's losses and the criteria's terms by name.

        Args:
            inputs: A batch, or a pair (the student's, the teacher's).
            data_samples: The labels, as the student's head wants them.

        Raises:
            ValueError: If there are no data samples, or the inputs are neither a batch nor a pair.
        """
        if not data_samples:
            raise ValueError(
                "data_samples are missing in mode 'loss': end the train pipeline with "
                "dict(type='PackInputs')"
            )
        self._follow_epochs()
        x, x_teacher, paired = images_of_both(
            inputs,
            self._renormalise,
            "inputs must be one batch of images or a pair (the student's, the teacher's)",
        )
        mask = pairs_of(data_samples)
        if mask is not None:
            x_teacher, paired = rows_of(x_teacher, mask)
        losses, terms = self.distiller(
            {"inputs": x, "data_samples": data_samples, "mode": "loss"},
            labels_of(data_samples),
            x_teacher={"inputs": x_teacher, "mode": "tensor"},
            paired=paired,
            index=index_of(data_samples, x.device),
        )
        named = {"loss_student" if key == "loss" else key: value for key, value in losses.items()}
        weight = self.distill_weight
        return named | {f"loss_{name}": weight * value for name, value in terms.items()}

    def get_layer_depth(self, param_name: str) -> tuple[int, int]:
        """Returns a parameter's depth for mmpretrain's layer-wise decay; a criterion's is last."""
        prefix = "distiller.student."
        if param_name.startswith(prefix):
            found: tuple[int, int] = self.student.get_layer_depth(param_name.removeprefix(prefix))
            return found
        _, depth = self.student.get_layer_depth("head.fc.weight")
        return depth - 1, depth

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _follow_epochs(self) -> None:
        """Ends the criterion's epoch where mmengine's Runner has begun another one."""
        current = MessageHub.get_current_instance().get_info("epoch")
        if current is None or not torch.is_grad_enabled():
            return
        if self._epoch is None:
            self._epoch = int(self.epoch)
        if 0 <= self._epoch < current:
            self.distiller.step_epoch()
        if self._epoch != current:
            self._epoch = int(current)
            self.epoch.fill_(self._epoch)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._epoch = None


@HOOKS.register_module()
class FallingWeightHook(Hook):  # type: ignore[misc]
    """Lets the weight of what is distilled fall from 1 to 0 over the training.

    ``custom_hooks=[dict(type="structkd.FallingWeightHook")]`` in a config. The weight is
    :func:`structkd.falling` of the iteration, and the student's own losses keep theirs.
    """

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        model.distill_weight = falling(runner.iter, runner.max_iters)


def _registered(spec: Any) -> Any:
    """Puts classes for the names of criteria that a user has registered in the scope structkd."""
    if isinstance(spec, list | tuple):
        return [_registered(part) for part in spec]
    if isinstance(spec, str):
        spec = {"type": spec}
    if isinstance(spec, Mapping) and isinstance(spec.get("type"), str):
        found = MODELS.get(spec["type"].removeprefix("structkd."))
        if isinstance(found, type) and issubclass(found, Criterion):
            return {**spec, "type": found}
    return spec


def _built(name: str, given: object) -> nn.Module:
    if isinstance(given, nn.Module):
        return given
    if not isinstance(given, Mapping):
        raise TypeError(
            f"{name} must be a classifier's config, dict(type='ImageClassifier', ...), or the "
            f"classifier, got {describe(given)}"
        )
    if given.get("type") is None:
        raise ValueError(
            f"{name}'s config has no type, only {sorted(given)}: give a whole classifier, "
            f"{name}={{{{_base_.model}}}} for example"
        )
    classifier: Any = CLASSIFIERS.build(given)
    if not isinstance(classifier, BaseClassifier):
        raise TypeError(
            f"{name} must be an mmpretrain classifier, got a {type(classifier).__name__}: put it "
            "into dict(type='ImageClassifier', backbone=..., head=...)"
        )
    built: nn.Module = classifier
    return built


def _teacher(given: object, checkpoint: str | None) -> nn.Module:
    classifier = _built("teacher", given)
    if checkpoint is not None:
        state = CheckpointLoader.load_checkpoint(checkpoint, map_location="cpu", logger="silent")
        state = state.get("state_dict", state)
        try:
            classifier.load_state_dict(
                {key.removeprefix("module."): value for key, value in state.items()}
            )
        except RuntimeError as error:
            raise ValueError(
                f"teacher_checkpoint={checkpoint!r} does not fit the teacher's config: {error}"
            ) from error
    elif isinstance(given, Mapping):
        if not names_weights(given):
            raise ValueError(
                "the teacher has no weights: pass teacher_checkpoint (a path or URL), or name them "
                "in its config, teacher=dict(..., pretrained=...)"
            )
        initialise: Any = getattr(classifier, "init_weights", lambda: None)
        initialise()
    return classifier


def _preprocessor(
    given: dict[str, Any] | nn.Module | None, augments: dict[str, Any] | None, student: nn.Module
) -> nn.Module:
    """Builds the data preprocessor as ``ImageClassifier`` does, or takes the student's."""
    if given is None:
        own = getattr(student, "data_preprocessor", None)
        if isinstance(own, nn.Module):
            return own
    if isinstance(given, nn.Module):
        return given
    config = {"type": "ClsDataPreprocessor", **(given or {})}
    if augments:  # no other preprocessor knows the word
        config.setdefault("batch_augments", augments)
    built: nn.Module = CLASSIFIERS.build(config)
    return built
