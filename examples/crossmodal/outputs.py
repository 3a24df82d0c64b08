"""What ``train.py`` leaves beside the results: the table, and figures of the seed-0 students."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from rich.console import Console
from torch import nn

from crossmodal import evaluation, figures, models, report
from crossmodal.data import ImagePairs
from crossmodal.job import Job, Session
from crossmodal.sources import stratified
from crossmodal.store import write_atomically

_FIGURE_IMAGES = 1000  # t-SNE of more takes minutes and shows less


def write(session: Session, rows: Sequence[report.Row], console: Console) -> None:
    """Print the table; write results.md and the three figures."""
    job, facts = session.job, session.facts
    title = heading(job)
    console.print(report.table(rows, facts, title=title))
    text = report.markdown(rows, facts, title=title, command=job.command)
    write_atomically(job.out / "results.md", lambda path: path.write_text(text))
    figures.draw_accuracy(rows, facts, job.out / "accuracy.png", title=title)
    _draw_features(session, rows)
    console.print(f"results, table and figures: {job.out}")


def heading(job: Job) -> str:
    """What a job's numbers are."""
    held_out = "validation" if job.evaluate == "val" else "test"
    return f"{job.dataset}, {held_out} accuracy on poor images, student {job.student}"


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


def _draw_features(session: Session, rows: Sequence[report.Row]) -> None:
    job, train = session.job, session.train
    shown = first_images(session.held_out, _FIGURE_IMAGES)
    networks: dict[str, tuple[nn.Module, evaluation.Modality]] = {
        f"teacher ({job.teacher}, clean)": (session.teacher, "clean")
    }
    for method in _figure_methods([row.method for row in rows]):
        student = models.create(
            job.student, num_classes=len(train.classes), in_chans=train.clean.shape[1]
        )
        seed = job.seeds[0]
        session.checkpoint(method, seed, session.settings(method, seed)).load_into(student)
        name = "student alone (poor)" if method == "alone" else f"student, {method} (poor)"
        networks[name] = (student, "poor")
    features = {
        name: evaluation.capture_features(
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
