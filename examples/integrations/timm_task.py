# ruff: noqa: C408
"""timm's task in a loop of one's own: python timm_task.py IMAGES TEACHER.pth"""

import sys

import timm
import torch
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2

from structkd.integrations.timm import DistillationTask


def train(student, teacher, loader, epochs, distill):
    task = DistillationTask(student, teacher, distill=distill)
    optimizer = create_optimizer_v2(
        task.get_trainable_module(), opt="adamw", lr=1e-3
    )
    losses = []
    for _ in range(epochs):
        # This also ends the criterion's last epoch.
        task.get_trainable_module().train()
        for images, target in loader:
            found = task(images, target)
            found["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(found["loss"].item())
    return task, losses


def main(folder, teacher_path, size=224, batch_size=64, epochs=10):
    data = create_dataset("", root=folder, split="train", is_training=True)
    student = timm.create_model("resnet18", num_classes=10)
    teacher = timm.create_model(
        "resnet34", num_classes=10, checkpoint_path=teacher_path
    )
    loader = create_loader(
        data,
        (3, size, size),
        batch_size,
        is_training=True,
        use_prefetcher=False,
        num_workers=0,
    )
    distill = [dict(type="DSLoss"), dict(type="KDLoss", weight=0.5)]
    task, losses = train(student, teacher, loader, epochs, distill)
    torch.save(task.get_checkpoint_state(), "student.pth")  # nothing of the teacher
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:])
