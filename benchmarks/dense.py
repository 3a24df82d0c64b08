"""Dense dimensional structure beside FitNetLoss: forward and backward on the same maps.

Each row runs in one process on one batch: a trained 1x1 convolution in both, and the closed form
that has none. The peer of the answer is C as it is written down, from the convolved map.

    python benchmarks/dense.py [--quick] [--channels-last]
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from _report import best_time, machine, seconds, set_threads, table
from torch import Tensor

from structkd import Criterion, DenseStructureLoss, FitNetLoss

# Batch, channels of the student and of the teacher, height: ResNet-8 from ResNet-20 on 32x32
# images stage by stage, a wider teacher, a narrower one, and ResNet-18 from ResNet-50.
GRID = (
    (128, 16, 16, 32), (128, 32, 32, 16), (128, 64, 64, 8), (128, 16, 64, 32), (128, 64, 256, 8),
    (128, 64, 16, 32), (32, 64, 256, 56), (32, 256, 1024, 14), (32, 512, 2048, 7),
)  # fmt: skip
QUICK = ((8, 16, 16, 8), (8, 8, 32, 8))


def defined(criterion: DenseStructureLoss, student: Tensor, teacher: Tensor) -> Tensor:
    """The diagonal term from the convolved map, without sums."""
    ((weight, _),) = criterion.convs([(student.shape[1], teacher.shape[1])], student)
    x = F.conv2d(student, weight[:, :, None, None]).transpose(0, 1).flatten(1).double()
    y = teacher.transpose(0, 1).flatten(1).double()
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    var_x, var_y = x.square().mean(1), y.square().mean(1)
    scale = (var_x + criterion.floor * var_x.mean()) * (var_y + criterion.floor * var_y.mean())
    diagonal = (x * y).mean(1) / scale.sqrt()
    return torch.log(1 - diagonal.clamp_min(0).square() + 0.01).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    set_threads(args.threads)
    memory = torch.channels_last if args.channels_last else torch.contiguous_format
    rows = []
    for batch, width_s, width_t, side in QUICK if args.quick else GRID:
        torch.manual_seed(0)
        student, teacher = (
            torch.randn(batch, width, side, side, device=args.device).to(memory_format=memory)
            for width in (width_s, width_t)
        )
        # Something to find, as between two networks that see the same pixels.
        teacher[:, : min(width_s, width_t)] += student[:, : min(width_s, width_t)]
        student.requires_grad_()

        def call(
            criterion: Criterion, student: Tensor = student, teacher: Tensor = teacher
        ) -> None:
            student.grad = None
            criterion.zero_grad()
            criterion(student, teacher).backward()
            if student.is_cuda:
                torch.cuda.synchronize()

        dense = DenseStructureLoss(terms=["Dense-1"])
        with torch.no_grad():
            gap = float((dense(student, teacher) - defined(dense, student, teacher)).abs())
        criteria = (
            FitNetLoss(),
            DenseStructureLoss(),
            DenseStructureLoss(adapter="closed_form"),
        )
        spent = [best_time(lambda c=each: call(c), args.repeat) for each in criteria]  # type: ignore[misc]
        rows.append(
            [
                f"{batch} x {width_s} to {width_t} x {side} x {side}",
                *map(seconds, spent),
                *(f"{spent[0] / each:.2f} x" for each in spent[1:]),
                f"{gap:.0e}",
            ]
        )
    device = torch.cuda.get_device_name() if args.device == "cuda" else machine()
    print(f"{device}{', channels last' if args.channels_last else ''}\n")
    head = [
        "maps",
        "FitNets",
        "dense",
        "closed form",
        "dense is",
        "closed form is",
        "value is off by",
    ]
    print(table(head, rows))


if __name__ == "__main__":
    main()
