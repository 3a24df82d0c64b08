# ruff: noqa: C408
"""A Distiller in Lightning.

python lightning_module.py IMAGES TEACHER.pth [PRECISION]
"""

import sys

import lightning
import timm
import torch
import torch.nn.functional as F
from timm.utils.agc import adaptive_clip_grad
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

import structkd


class Distilled(lightning.LightningModule):
    def __init__(self, distiller):
        super().__init__()
        self.distiller = (
            distiller  # checkpoints hold student and criterion, not the teacher
        )

    def training_step(self, batch, _):
        images, target = batch
        output, terms = self.distiller(images, target, x_teacher=images)
        loss = F.cross_entropy(output, target) + sum(terms.values())
        self.log_dict({"loss": loss, **terms})
        return loss

    def validation_step(self, batch, _):
        images, target = batch
        output = self.distiller.student(images)
        self.log("accuracy", (output.argmax(1) == target).float().mean())

    def configure_gradient_clipping(self, optimizer, **_):
        # A strong criterion must not spoil the filters of early layers.
        adaptive_clip_grad(self.distiller.student.parameters(), clip_factor=0.1)

    def on_train_epoch_end(self):
        self.distiller.step_epoch()

    def configure_optimizers(self):
        # Adam's eps of 1e-8 is zero in float16: in "16-true" give it eps=1e-4.
        return torch.optim.SGD(self.distiller.parameters(), lr=0.02, momentum=0.9)


def main(folder, teacher_path, precision="32-true", batch_size=64, **options):
    convert = transforms.ToTensor()
    train, test = (
        datasets.ImageFolder(f"{folder}/{part}", convert)
        for part in ("train", "test")
    )
    loader = DataLoader(train, batch_size, shuffle=True, drop_last=True)
    student = timm.create_model("resnet18", num_classes=len(train.classes))
    teacher = timm.create_model("resnet34", num_classes=len(train.classes))
    teacher.load_state_dict(torch.load(teacher_path, weights_only=True))
    spec = [dict(type="DSLoss"), dict(type="KDLoss", weight=0.5)]
    example, _ = next(iter(loader))
    module = Distilled(structkd.Distiller(student, teacher, spec, example=example))
    trainer = lightning.Trainer(
        precision=precision, **{"max_epochs": 10, **options}
    )
    trainer.fit(module, loader, DataLoader(test, batch_size))
    return trainer, module


if __name__ == "__main__":
    main(*sys.argv[1:])
