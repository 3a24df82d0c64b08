"""The main job: one teacher, students by method and seed, then the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

import structkd
from crossmodal import engine, figures, models, report
from crossmodal.data import ImagePairs, load
from crossmodal.engine import Config
from crossmodal.methods import resolve
from crossmodal.sources import stratified
from crossmodal.store import Checkpoint, Results, key, write_atomically

_FIGURE_IMAGES = 1000  # t-SNE of more takes minutes and shows less
_NO_PART_OF_A_RESULT = ("device",)


@dataclass(frozen=True)
class Job:
    """Everything that one call of ``train.py`` asks for.

    Attributes:
        dataset, data_dir, download, limit, amount: as ``data.load`` takes them.
        methods: names for ``methods.resolve``.
        seeds: of the students; the first one's checkpoints are kept for the figures.
        teacher, student: model names.
        teacher_config, config: how to train them; the job sets the students' seeds.
        evaluate: ``test`` (training on all of train), or ``val`` (training on the rest of it).
        out: folder for checkpoints, results and figures.
        fresh: train students again that ``results.json`` already has.
        command: the command line, for the record.
    """

    dataset: str
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    teacher: str
    student: str
    teacher_config: Config
    config: Config
    amount: float
    out: Path
    data_dir: Path | None = None
    download: bool = False
    limit: int | None = None
    evaluate: str = "test"
    fresh: bool = False
    command: str = ""


def run(job: Job, console: Console) -> list[report.Row]:
    """Train what is missing, write results.json, results.md and the figures, print the table."""
    plans = {resolve(name).name: resolve(name) for name in job.methods}
    train, held_out = load_splits(job)
    results = Results(job.out)
    teacher, teacher_settings = trained_teacher(job, train, console)
    statistics, device = train.statistics, job.config.device
    clean, poor = (
        engine.evaluate(teacher, held_out, modality=m, statistics=statistics, device=device)
        for m in ("clean", "poor")
    )
    facts = report.Teacher(job.teacher, clean, poor)
    console.print(
        f"teacher {job.teacher}: {clean:.2f} % on clean images, {poor:.2f} % on poor ones"
    )
    header = {"command": job.command, "dataset": job.dataset, "teacher": asdict(facts)}
    runs = []
    for name, plan in plans.items():
        for seed in job.seeds:
            settings = student_settings(job, train, seed, teacher_settings if plan.parts else None)
            checkpoint = Checkpoint(job.out, f"student-{name}-seed{seed}", settings)
            keep = seed == job.seeds[0]
            done = results.find(name, seed, settings)
            if done is None or job.fresh or (keep and not checkpoint.path.exists()):
                config = replace(job.config, seed=seed)
                outcome = engine.distil(name, job.student, teacher, train, config, console=console)
                if keep:
                    checkpoint.save(outcome.model)
                accuracy = engine.evaluate(
                    outcome.model, held_out, modality="poor", statistics=statistics, device=device
                )
                done = {
                    "method": name,
                    "seed": seed,
                    "accuracy": accuracy,
                    "loss": outcome.loss,
                    "terms": outcome.terms,
                    "train_accuracy": outcome.train_accuracy,
                    "seconds": round(outcome.seconds, 2),
                    "device": device,
                    "config": settings,
                }
                results.add(done, header=header)
                console.print(f"{name} seed {seed}: {accuracy:.2f} % ({outcome.seconds:.0f} s)")
            else:
                console.print(f"{name} seed {seed}: {done['accuracy']:.2f} % (finished before)")
            runs.append(done)
    results.write(header)
    rows = report.rows(runs)
    _report(job, rows, facts, console)
    _draw(job, train, held_out, teacher, teacher_settings, rows, facts)
    console.print(f"results, table and figures: {job.out}")
    return rows


def load_splits(job: Job) -> tuple[ImagePairs, ImagePairs]:
    """The training images and the held-out ones that the job evaluates on."""
    train, held_out = (
        load(
            job.dataset,
            data_dir=job.data_dir,
            split=split,
            amount=job.amount,
            limit=job.limit,
            download=job.download,
        )
        for split in ("fit" if job.evaluate == "val" else "train", job.evaluate)
    )
    return train, held_out


def trained_teacher(
    job: Job, train: ImagePairs, console: Console | None
) -> tuple[nn.Module, dict[str, Any]]:
    """The teacher from its checkpoint, or trained and saved, with the settings it depends on."""
    settings = {
        "model": job.teacher,
        "dataset": job.dataset,
        "images": train.fingerprint,
        "training": _training(job.teacher_config),
    }
    checkpoint = Checkpoint(job.out, "teacher", settings)
    in_chans = train.clean.shape[1]
    model = models.create(job.teacher, num_classes=len(train.classes), in_chans=in_chans)
    models.on_device(model, job.config.device)
    if checkpoint.load_into(model):
        if console is not None:
            console.print(f"teacher read from {checkpoint.path}")
        return model, settings
    outcome = engine.train_teacher(job.teacher, train, job.teacher_config, console=console)
    checkpoint.save(outcome.model, seconds=outcome.seconds)
    if console is not None:
        console.print(f"teacher {job.teacher} trained in {outcome.seconds:.0f} s")
    return outcome.model, settings


def _training(config: Config) -> dict[str, Any]:
    return {k: v for k, v in asdict(config).items() if k not in _NO_PART_OF_A_RESULT}


def student_settings(
    job: Job, train: ImagePairs, seed: int, teacher: dict[str, Any] | None
) -> dict[str, Any]:
    return {
        "model": job.student,
        "dataset": job.dataset,
        "images": train.fingerprint,
        "amount": train.amount,
        "samples": len(train),
        "evaluate": job.evaluate,
        "structkd": structkd.__version__,
        "teacher": None if teacher is None else f"{teacher['model']}-{key(teacher)}",
        "training": _training(replace(job.config, seed=seed)),
    }


def _report(
    job: Job, rows: Sequence[report.Row], teacher: report.Teacher, console: Console
) -> None:
    title = _title(job)
    console.print(report.table(rows, teacher, title=title))
    text = report.markdown(rows, teacher, title=title, command=job.command)
    write_atomically(job.out / "results.md", lambda path: path.write_text(text))


def _title(job: Job) -> str:
    held_out = "validation" if job.evaluate == "val" else "test"
    return f"{job.dataset}, {held_out} accuracy on poor images, student {job.student}"


def _draw(
    job: Job,
    train: ImagePairs,
    held_out: ImagePairs,
    teacher: nn.Module,
    teacher_settings: dict[str, Any],
    rows: Sequence[report.Row],
    facts: report.Teacher,
) -> None:
    figures.draw_accuracy(rows, facts, job.out / "accuracy.png", title=_title(job))
    shown = first_images(held_out, _FIGURE_IMAGES)
    networks: dict[str, tuple[nn.Module, engine.Modality]] = {
        f"teacher ({job.teacher}, clean)": (teacher, "clean")
    }
    for method in _figure_methods([row.method for row in rows]):
        student = models.create(
            job.student, num_classes=len(train.classes), in_chans=train.clean.shape[1]
        )
        needed = teacher_settings if resolve(method).parts else None
        seed = job.seeds[0]
        settings = student_settings(job, train, seed, needed)
        Checkpoint(job.out, f"student-{method}-seed{seed}", settings).load_into(student)
        name = "student alone (poor)" if method == "alone" else f"student, {method} (poor)"
        networks[name] = (student, "poor")
    features = {
        name: engine.capture_features(
            model,
            shown,
            modality=modality,
            statistics=train.statistics,
            device=job.config.device,
        )
        for name, (model, modality) in networks.items()
    }
    embeddings = {name: embedding for name, (embedding, _) in features.items()}
    figures.draw_self_similarity(embeddings, job.out / "self_similarity.png")
    pooled = {name: stage for name, (_, stage) in features.items()}
    figures.draw_tsne(pooled, shown.labels, shown.classes, job.out / "tsne.png")


def _figure_methods(methods: Sequence[str]) -> list[str]:
    """The lone student and DS where they were run; else the last method stands for DS."""
    distilled = [name for name in methods if name != "alone"]
    second = ["ds"] if "ds" in distilled else distilled[-1:]
    return [name for name in methods if name == "alone"] + second


def first_images(pairs: ImagePairs, count: int) -> ImagePairs:
    """A stratified choice of at most ``count`` images."""
    rows = torch.from_numpy(stratified(pairs.labels.numpy(), count, draw=0))
    return replace(
        pairs,
        clean=pairs.clean[rows],
        poor=pairs.poor[rows],
        labels=pairs.labels[rows],
        index=pairs.index[rows],
    )
