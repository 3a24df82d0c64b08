# ruff: noqa: C408
"""A Distiller in Hugging Face's Trainer: python hf_trainer.py IMAGES TEACHER"""

import sys

import torch
import torch.nn.functional as F
from torchvision import datasets, transforms
from transformers import (
    AutoModelForImageClassification,
    ResNetConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import structkd
from structkd import views


class DistillationTrainer(Trainer):
    loss_is_scaled_for_ga = False  # the mean of a batch; the Trainer accumulates

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        poor, rich, labels = inputs["poor"], inputs["rich"], inputs["labels"]
        if model.training:
            output, terms = model(poor, labels, x_teacher=rich)
        else:  # validation: the student alone
            student = self.accelerator.unwrap_model(model).student
            output, terms = student(poor), {}
        loss = F.cross_entropy(output.logits, labels) + sum(terms.values())
        return (loss, {"logits": output.logits}) if return_outputs else loss


class EndOfEpoch(TrainerCallback):
    def on_epoch_end(self, args, state, control, model, **_):
        model.step_epoch()  # criteria with a schedule need it


def collate(samples):
    rich = torch.stack([image for image, _ in samples])
    labels = torch.tensor([label for _, label in samples])
    return dict(poor=views.resolution(rich, 4), rich=rich, labels=labels)


def accuracy(predicted):
    return {"accuracy": float((predicted[0].argmax(1) == predicted[1]).mean())}


def main(folder, teacher_path, student_config=None, resume=False, **options):
    convert = transforms.ToTensor()
    train, test = (
        datasets.ImageFolder(f"{folder}/{part}", convert)
        for part in ("train", "test")
    )
    teacher = AutoModelForImageClassification.from_pretrained(teacher_path)
    config = student_config or ResNetConfig(num_labels=len(train.classes))
    student = AutoModelForImageClassification.from_config(config)
    example = collate([train[0], train[1]])
    distiller = structkd.Distiller(
        student,
        teacher,
        5 * structkd.DenseStructureLoss() + structkd.KDLoss(),
        layers=dict(
            intermediate=["resnet.encoder.stages.1", "resnet.encoder.stages.2"]
        ),
        example=(example["poor"], example["rich"]),  # the Trainer counts parameters
    )
    arguments = dict(output_dir="runs", num_train_epochs=10, learning_rate=1e-3)
    arguments |= dict(
        eval_strategy="epoch", save_strategy="epoch", report_to="none"
    )
    arguments |= dict(remove_unused_columns=False, label_names=["labels"])
    trainer = DistillationTrainer(
        distiller,
        TrainingArguments(**arguments | options),
        train_dataset=train,
        eval_dataset=test,
        data_collator=collate,
        compute_metrics=accuracy,
        callbacks=[EndOfEpoch()],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, distiller


if __name__ == "__main__":
    trainer, distiller = main(*sys.argv[1:])
    first = trainer.is_world_process_zero()
    distiller.student.save_pretrained("student", is_main_process=first)
