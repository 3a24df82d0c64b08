"""What the criteria promise of pixels beyond the shared contract (tests/cases/pixels.py)."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import structkd
from structkd import Criterion, Features
from structkd.distributed import Shards

CLASSES = 4
WITH_LABELS: dict[str, Callable[[], Criterion]] = {
    "SRM": structkd.SupervisionLoss,
    "Dice": structkd.DiceLoss,
    "DKD": structkd.DKDLoss,
    "Logits": lambda: structkd.LogitMSELoss(ignore=-100),
    "Logits-log": lambda: structkd.LogitMSELoss(form="log", ignore=-100),
}
WITHOUT: dict[str, Callable[[], Criterion]] = {
    "KD": structkd.KDLoss,
    "KD-sigmoid": lambda: structkd.KDLoss(form="sigmoid"),
    "LSKD": structkd.LogitStandardizationLoss,
    "CTKD": structkd.CurriculumTemperatureLoss,
    "CWD": structkd.ChannelWiseLoss,
    "Logits-absolute": lambda: structkd.LogitMSELoss(form="absolute"),
}
ALL = {**WITH_LABELS, **WITHOUT}


def _batch(seed: int, *, size: tuple[int, int] = (4, 6), batch: int = 2) -> tuple[Tensor, ...]:
    rng = torch.Generator().manual_seed(seed)
    shape = (batch, CLASSES, *size)
    student, teacher = 2 * torch.randn(2, *shape, generator=rng, dtype=torch.float64)
    target = torch.randint(0, CLASSES, (batch, *size), generator=rng)
    target[torch.rand(target.shape, generator=rng) < 0.3] = -100
    return student.requires_grad_(), teacher, target


def _value(criterion: Criterion, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    return criterion.double()(Features(logits=student), Features(logits=teacher), target)


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_permuting_pixels_alike_changes_nothing(name: str, seed: int) -> None:
    student, teacher, target = _batch(seed)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(seed))

    def moved(value: Tensor) -> Tensor:
        return value.flatten(-2)[..., order].view(value.shape)

    value = _value(ALL[name](), student, teacher, target)
    again = _value(ALL[name](), moved(student), moved(teacher), moved(target))
    torch.testing.assert_close(again, value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", WITH_LABELS)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**16), junk=st.sampled_from([0.0, 1e6, float("inf"), float("nan")]))
def test_ignored_pixels_change_nothing(name: str, seed: int, junk: float) -> None:
    student, teacher, target = _batch(seed)
    gone = (target == -100)[:, None]
    value = _value(WITH_LABELS[name](), student, teacher, target)
    (wanted,) = torch.autograd.grad(value, student)
    assert not wanted[gone.expand_as(wanted)].any()
    spoiled = [
        value.detach().masked_fill(gone, junk).requires_grad_() for value in (student, teacher)
    ]
    again = _value(WITH_LABELS[name](), *spoiled, target)
    torch.testing.assert_close(again, value, rtol=1e-12, atol=1e-12)
    if not math.isfinite(junk):  # may reach the gradients
        return
    (grad,) = torch.autograd.grad(again, spoiled[0])
    torch.testing.assert_close(grad, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", WITH_LABELS)
def test_no_label_costs_0_with_a_gradient_of_0(name: str) -> None:
    student, teacher, target = _batch(0)
    value = _value(WITH_LABELS[name](), student, teacher, torch.full_like(target, -100))
    value.backward()
    assert float(value.detach()) == 0
    assert student.grad is not None
    assert not student.grad.any()


def test_the_cross_entropy_is_torchs() -> None:
    student, teacher, target = _batch(3)
    value = _value(structkd.SupervisionLoss(label_smoothing=0.1), student, teacher, target)
    wanted = F.cross_entropy(student, target, label_smoothing=0.1)
    torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12)
    soft = teacher.softmax(dim=1)
    value = _value(structkd.SupervisionLoss(), student, teacher, soft)
    torch.testing.assert_close(value, F.cross_entropy(student, soft), rtol=1e-12, atol=1e-12)


def test_one_logit_is_a_question_of_yes_or_no() -> None:
    student, teacher, target = _batch(4)
    student, flood = student[:, :1], (target > 1).long()
    value = _value(structkd.SupervisionLoss(), student, teacher, flood)
    wanted = F.binary_cross_entropy_with_logits(student[:, 0], flood.double())
    torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12)
    soft = teacher[:, :1].sigmoid()
    value = _value(structkd.SupervisionLoss(), student, teacher, soft)
    wanted = F.binary_cross_entropy_with_logits(student, soft)
    torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12)
    rough = soft.bfloat16()
    value = _value(structkd.SupervisionLoss(), student, teacher, rough)
    wanted = F.binary_cross_entropy_with_logits(student, rough.double())
    torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"shape \((\d), 1, (\d), (\d)\), got \(\1, \2, \3\)"):
        _value(structkd.SupervisionLoss(), student, teacher, soft[:, 0])
    with pytest.raises(ValueError, match=r"target must lie in 0\.\.1"):
        _value(structkd.DiceLoss(), student, teacher, 2 * flood)


@pytest.mark.parametrize("smooth", [0.0, 1.0])
@pytest.mark.parametrize("classes", [1, 4])
def test_dice_is_that_of_segmentation_models_pytorch(classes: int, smooth: float) -> None:
    losses = pytest.importorskip("segmentation_models_pytorch").losses
    student, teacher, target = _batch(5)
    target[target == 3] = 1  # a class that no pixel has
    if classes == 1:
        student, target = student[:, :1], target.clamp(max=1)
    mode = "binary" if classes == 1 else "multiclass"
    wanted = losses.DiceLoss(mode, ignore_index=-100, smooth=smooth)(student, target)
    value = _value(structkd.DiceLoss(smooth=smooth), student, teacher, target)
    torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-7)


def _resized(logits: Tensor, *size: int) -> Tensor:
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


@pytest.mark.parametrize("name", WITHOUT)
def test_the_teachers_logits_are_brought_to_the_students_size(name: str) -> None:
    student, teacher, _ = _batch(6)
    for other in (_resized(teacher, 3, 9), _resized(teacher, 16, 24)):
        value = _value(WITHOUT[name](), student, other, torch.zeros(2, 16, 24).long())
        wanted = _value(WITHOUT[name](), student, _resized(other, 4, 6), torch.zeros(2).long())
        torch.testing.assert_close(value, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("name", WITH_LABELS)
@pytest.mark.parametrize("size", [(16, 24), (15, 22), (4, 6)])
def test_logits_are_brought_to_the_size_of_larger_labels(name: str, size: tuple[int, int]) -> None:
    student, teacher, _ = _batch(7)
    target = _batch(8, size=size)[2]
    value = _value(WITH_LABELS[name](), student, _resized(teacher, 2, 3), target)
    brought = _resized(student, *size), _resized(_resized(teacher, 2, 3), *size)
    torch.testing.assert_close(value, _value(WITH_LABELS[name](), *brought, target))


@pytest.mark.parametrize("size", [(65, 129), (129, 65), (9, 128)])
@pytest.mark.parametrize("stride", [4, 8])
def test_labels_of_a_narrow_image_are_no_multiple_of_the_logits(size, stride) -> None:
    logits = torch.randn(1, CLASSES, *(-(-side // stride) for side in size))
    loss = structkd.SupervisionLoss()
    found = loss(Features(logits=logits), Features(), torch.ones(1, *size).long())
    wanted = F.cross_entropy(_resized(logits, *size), torch.ones(1, *size).long())
    torch.testing.assert_close(found, wanted)


def test_a_class_that_is_masked_out_stays_so_at_another_size() -> None:
    student, teacher, _ = _batch(9)
    teacher = _resized(teacher, 8, 12)
    wanted = structkd.KDLoss()(student[:, 1:], teacher[:, 1:])
    closed = [torch.full_like(v[:, :1], -torch.inf) for v in (student, teacher)]
    both = [
        torch.cat([c, v[:, 1:]], dim=1) for c, v in zip(closed, (student, teacher), strict=True)
    ]
    torch.testing.assert_close(structkd.KDLoss()(*both), wanted)


@pytest.mark.parametrize("side", [0, 1])
def test_a_class_that_is_masked_out_ranks_no_position(side: int) -> None:
    maps = [value.detach() for value in _batch(9)[:2]]
    wanted = structkd.ChannelWiseLoss()(*(value[:, 1:] for value in maps))
    maps[side][:, 0] = -torch.inf
    student = maps[0].requires_grad_()
    value = structkd.ChannelWiseLoss()(student, maps[1])
    torch.testing.assert_close(value, wanted * (CLASSES - 1) / CLASSES)
    value.backward()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("name", ALL)
def test_the_layout_in_memory_changes_nothing(name: str) -> None:
    student, teacher, target = _batch(10)
    value = _value(ALL[name](), student, teacher, target)
    last = [v.to(memory_format=torch.channels_last) for v in (student, teacher)]
    turned = [v.mT.contiguous().mT for v in (student, teacher, target)]
    for laid_out in ((*last, target), turned):
        found = _value(ALL[name](), *laid_out)
        torch.testing.assert_close(found, value, rtol=1e-12, atol=1e-12)


def test_a_criterion_of_ones_own_is_given_rows_unless_it_asks_for_maps() -> None:
    class Gap(Criterion):
        reads = ("logits",)

        def compute(self, *given) -> dict[str, Tensor]:
            seen[self.pixels] = [given[0].logits, given[1].logits, given[2]]
            return {"gap": given[0].logits.sum()}

    student, teacher, target = _batch(11)
    seen: dict[str, list[Tensor]] = {}
    for pixels in ("rows", "labelled", "maps", "labelled maps"):
        criterion = Gap()
        criterion.pixels = pixels
        criterion(student, _resized(teacher, 2, 3), target)
    teacher = _resized(_resized(teacher, 2, 3), 4, 6)
    for pixels, found in seen.items():
        wanted = [student, teacher, target]
        if not pixels.endswith("maps"):
            wanted = [v.movedim(1, -1).reshape(-1, CLASSES) for v in wanted[:2]] + [
                target.flatten()
            ]
        for value, right in zip(found, wanted, strict=True):
            torch.testing.assert_close(value, right, rtol=0, atol=0)


# How many copies of the student's logits a call keeps for its backward pass, at most. DKD parts a
# row into the label's class and the others; an index of int64 for that is two copies.
COPIES = {"DKD": 9.0, "KD-sigmoid": 6.0}


@pytest.mark.parametrize("name", ALL)
def test_a_few_copies_of_the_logits_are_kept(name: str) -> None:
    rng = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 2, 19, 64, 128, generator=rng)
    student.requires_grad_()
    target = torch.randint(0, 19, (2, 64, 128), generator=rng)
    kept: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    criterion = ALL[name]()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        value = criterion(Features(logits=student), Features(logits=teacher), target)
    value.backward()
    assert sum(kept.values()) / student.untyped_storage().nbytes() <= COPIES.get(name, 4.0)


MISTAKES: dict[str, tuple[Criterion, tuple[int, ...], tuple[int, ...], tuple[int, ...], str]] = {
    "ranks": (structkd.KDLoss(), (2, 4), (2, 4, 6, 6), (2,), r"both be of images.*of pixels"),
    "classes": (structkd.KDLoss(), (2, 3, 6, 6), (2, 4, 6, 6), (2,), r"3 and 4; .*same classes"),
    "image": (structkd.ChannelWiseLoss(), (2, 4), (2, 4), (2,), r"\(B, K, H, W\).*KDLoss"),
    "position": (structkd.ChannelWiseLoss(), (2, 4, 1, 1), (2, 4, 1, 1), (2,), "one only"),
    "size": (structkd.DKDLoss(), (2, 4, 6, 6), (2, 4, 6, 6), (2, 9, 9), r"not resized.*crop"),
    "small": (structkd.DiceLoss(), (2, 4, 6, 6), (2, 4, 6, 6), (2, 3, 3), "target .*not resized"),
    "turned": (structkd.DiceLoss(), (2, 4, 6, 8), (2, 4, 6, 8), (2, 8, 6), "target .*not resized"),
    "channel": (structkd.SupervisionLoss(), (2, 4, 6, 6), (), (2, 1, 6, 6), r"target\[:, 0\]"),
    "labels": (structkd.SupervisionLoss(), (2, 4, 6, 6), (), (2,), r"target must be \(B, H, W\)"),
    "samples": (structkd.SupervisionLoss(), (2, 4, 6, 6), (), (3, 6, 6), "2 samples.*got 3"),
    "mask": (structkd.LogitMSELoss(ignore=-100), (2, 4), (2, 4), (2, 3), "target .*each row"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named_in_one_line_with_the_cure(name: str) -> None:
    criterion, shape_s, shape_t, labels, said = MISTAKES[name]
    teacher = Features(logits=torch.randn(shape_t)) if shape_t else Features()
    with pytest.raises(ValueError, match=said) as caught:
        criterion(Features(logits=torch.randn(shape_s)), teacher, torch.zeros(labels).long())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [(), (6, 6)], ids=["images", "pixels"])
@pytest.mark.parametrize("name", WITH_LABELS)
def test_a_target_that_is_no_tensor_is_named(name: str, size: tuple[int, ...]) -> None:
    logits = Features(logits=torch.randn(2, CLASSES, *size))
    with pytest.raises((TypeError, ValueError), match=r"target.* a.* tensor"):
        WITH_LABELS[name]()(logits, logits, [0, 1])


def test_regression_says_what_it_lacks() -> None:
    rows = torch.randn(1, 1)
    with pytest.raises(ValueError, match="needs target"):
        structkd.LogitMSELoss(ignore=float("nan"))(rows, rows)
    with pytest.raises(ValueError, match=r"at least 2, got 1.*drop_last"):
        structkd.LogitMSELoss(form="log")(rows, rows)
    pixels, shards = torch.randn(1, 2, 3, 3), Shards((1, 0), rank=1)
    # The rank without a row goes on as the one with nine, which waits for it.
    found = structkd.LogitMSELoss(form="log", gather=True).terms(
        pixels[:0], pixels[:0], shards=shards
    )
    assert found["Logits"].isfinite()
    with pytest.raises(ValueError, match="form must be one of squared, absolute, log"):
        structkd.LogitMSELoss(form="l1")
    with pytest.raises(TypeError, match="ignore must be a number"):
        structkd.LogitMSELoss(ignore="nan")


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16), power=st.integers(-4, 4), level=st.floats(-100, 100))
def test_the_logarithm_does_not_see_the_unit_of_the_prediction(seed, power, level) -> None:
    student, teacher, _ = _batch(seed)
    criterion = structkd.LogitMSELoss(form="log")
    moved = [10.0**power * (value + level) for value in (student, teacher)]
    torch.testing.assert_close(criterion(*moved), criterion(student, teacher), rtol=1e-6, atol=1e-6)
