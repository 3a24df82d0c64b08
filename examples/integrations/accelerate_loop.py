# ruff: noqa: C408
"""A Distiller in Accelerate.

accelerate launch accelerate_loop.py IMAGES TEACHER.pth
"""

import sys

import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

import structkd


def main(folder, teacher_path, precision="no", epochs=10, batch_size=64, **options):
    accelerator = Accelerator(mixed_precision=precision, **options)
    data = datasets.ImageFolder(f"{folder}/train", transforms.ToTensor())
    loader = DataLoader(data, batch_size, shuffle=True, drop_last=True)
    student = timm.create_model("resnet18", num_classes=len(data.classes))
    teacher = timm.create_model("resnet34", num_classes=len(data.classes))
    teacher.load_state_dict(torch.load(teacher_path, weights_only=True))
    spec = [dict(type="DSLoss"), dict(type="KDLoss", weight=0.5)]
    example, _ = next(iter(loader))
    distiller = structkd.Distiller(
        student, teacher, spec, example=example
    )  # DDP needs its shapes
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-3)
    distiller, optimizer, loader = accelerator.prepare(distiller, optimizer, loader)

    losses = []
    for _ in range(epochs):
        distiller.train()
        for images, target in loader:
            output, terms = distiller(images, target, x_teacher=images)
            loss = F.cross_entropy(output, target) + sum(terms.values())
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        accelerator.unwrap_model(distiller).step_epoch()
    return accelerator, distiller, losses


if __name__ == "__main__":
    accelerator, distiller, _ = main(*sys.argv[1:])
    accelerator.save_state("checkpoint")  # nothing of the teacher
