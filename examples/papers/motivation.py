"""DSKD's Sec. 3: classifiers on either modality (Fig. 1a), and what sets their features apart.

Fig. 2 and Eq. 5 in numbers: on held-out images, of the teacher and of each seed's students, whose
weights are kept for that. The teacher sees the rich images, the students the poor ones.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.markdown import Markdown
from torch import Tensor, nn

import train
from data import Images, Views
from data.sources import stratified
from methods import ALONE
from papers.figures import (
    LONE,
    PALETTE,
    below,
    draw_self_similarity,
    draw_tsne,
    drawing,
    off_diagonal,
)
from papers.grid import each, opened, split
from papers.reports import LOOKED_AT, look, pooled
from recipe import parsed
from store import versions, write_atomically, write_json
from structkd import CORALLoss
from structkd.diagnostics import effective_rank, self_similarity, uniformity
from table import table

MEASURES: Mapping[str, str] = {
    "accuracy": "accuracy %",
    "channels": "channels in use %",
    "off_diagonal": "off-diagonal cosine",
    "off_diagonal_centred": "the same, centred",
    "rank": "effective rank",
    "rank_centred": "the same, centred",
    "uniformity": "uniformity",
    "distance": "mean distance",
    "coral": "CORAL from the teacher",
    "eq5": "Eq. 5 from the teacher",
}
_MODALITIES = ("rich", "poor")
RICH = "alone, rich images"  # the student's kind of network, on what the teacher sees


@dataclass(frozen=True)
class Motivation:
    """DSKD's Sec. 3: Fig. 1(a) as a bar chart, Fig. 2 and Eq. 5 in numbers and pictures."""

    # Kinds of network that are trained on either modality; these fit images of 28 to 64 pixels.
    classifiers: tuple[str, ...] = (
        "resnet8x0_5", "crd_vgg8x0_25", "densenet22", "mobilenetv2_035", "vit_small4",
    )  # fmt: skip
    # Students whose features are looked at.
    criterion: tuple[str, ...] = (ALONE, "kd", "ds", "dense")


def motivation(arguments: Sequence[str], command: str) -> int:
    own, others = split(Motivation, arguments, "papers motivation RECIPE")
    options = parsed(others, train.Options, program="papers motivation")
    out = options.out or Path("runs") / f"motivation-{options.recipe}"
    options = replace(options, out=out)
    # A job a seed, as a job keeps the weights of its first one. Fig. 2 compares one kind of network
    # on both modalities, so the student's kind learns the rich one as well.
    jobs: dict[str, tuple[str | None, bool, dict[str, Any]]] = {}
    for seed in options.seeds:
        jobs[f"rich, seed {seed}"] = None, True, {"seeds": (seed,), "criterion": (ALONE,)}
        jobs[f"seed {seed}"] = None, False, {"seeds": (seed,), "criterion": own.criterion}
    for name in own.classifiers:
        for rich in (True, False):
            changes = {"student": name, "criterion": (ALONE,)}
            jobs[f"{name}, {'rich' if rich else 'poor'}"] = name, rich, changes
    shared: list[Views] = []

    def made(rich: bool, changes: dict[str, Any]) -> train.Session:
        views = shared[0] if shared else train.Session(options, command).views
        shared[:] = [views]
        if rich:  # a student alone, of the rich images
            views = replace(views, poor=views.rich, held_out_poor=views.held_out_rich)
        return train.Session(replace(options, **changes), command, views=views)

    classifiers, networks, pictures = [], [], {}
    for job, session in each(opened({job: partial(made, *how) for job, (_, *how) in jobs.items()})):
        runs, (name, rich, _) = session.run(), jobs[job]
        leads = session.leads and not session.helper
        if name is not None:
            more = {"classifier": name, "modality": "rich" if rich else "poor"}
            classifiers += [run | more for run in runs]
        elif leads:
            networks += measured(session, runs, pictures, rich=rich)
    if leads:
        found = {"command": command, "versions": versions(), "networks": networks}
        write_json(session.out / "motivation.json", found | {"classifiers": classifiers})
        views, told = shared[0], f"{options.recipe}, poor images by {shared[0].poverty}"
        draw_classifiers(classifiers, session.out / "classifiers.png", title=told)
        looks = {name: embedding for name, (embedding, _) in pictures.items()}
        draw_self_similarity(looks, session.out / "self_similarity.png")
        labels = views.held_out_poor.labels[sample(views.held_out_poor)]
        looks = {name: rows for name, (_, rows) in pictures.items()}
        draw_tsne(looks, labels, views.poor.classes, session.out / "tsne.png")
        body = f"{markdown(classifiers, networks, told)}\nMade by `{command}`.\n"
        write_atomically(session.out / "motivation.md", lambda file: file.write_text(body))
        session.console.print(Markdown(body))
        session.show.say(f"numbers and figures: {session.out}")
    return int(any("failed" in run for run in classifiers + networks))


def sample(images: Images) -> Tensor:
    return torch.from_numpy(stratified(images.labels.numpy(), LOOKED_AT, draw=0))


@torch.no_grad()
def measured(
    session: train.Session,
    runs: Sequence[Mapping[str, Any]],
    pictures: dict[str, tuple[Tensor, Tensor]],
    *,
    rich: bool,
) -> list[dict[str, Any]]:
    """A job's networks as runs with a ``structure`` each; the first of a name is put into pictures.

    The teacher is told with the students that learned the ``rich`` images as it did.
    """
    views, (seed,), found = session.views, session.options.seeds, []
    some = sample(views.held_out_poor)

    def seen(network: nn.Module, images: Images, like: Images) -> tuple[Tensor, Tensor, Tensor]:
        embedding, maps = look(network, images.chosen(some), like)
        logits = network.get_classifier()(embedding)
        # What a classifier adds to all classes says nothing.
        return embedding, pooled(maps), logits - logits.mean(1, keepdim=True)

    def add(run: Mapping[str, Any], features: tuple[Tensor, Tensor, Tensor], *more: Tensor) -> None:
        pictures.setdefault(run["method"], features[:2])
        found.append({**run, "structure": structure(*features, *more)})

    theirs = seen(session.teacher, views.held_out_rich, views.rich)
    if rich and "teacher" not in pictures:  # one for all seeds
        accuracy = session.facts["clean images"]
        add({"method": "teacher", "seed": 0, "accuracy": accuracy}, theirs)
    for method, run in zip(session.methods, runs, strict=True):
        run = {**run, "method": RICH} if rich else run
        network = session.network("student", seed)
        checkpoint = session.student_checkpoint(method, seed)
        if "failed" in run:
            found.append(dict(run))
        elif checkpoint.load_into(network) is None:
            raise ValueError(f"{checkpoint.path} was not kept; fix: another --out")
        else:
            add(run, seen(network, views.held_out_poor, views.poor), theirs[2])
    return found


def structure(
    embedding: Tensor, rows: Tensor, logits: Tensor, theirs: Tensor | None = None
) -> dict[str, float]:
    """Dimensional structure in numbers, by the names of ``MEASURES``.

    Args:
        embedding: ``(N, D)``. Channels that are zero everywhere correlate with nothing, so they are
            counted and left out.
        rows: The pooled intermediate map ``(N, C)``.
        logits: ``(N, K)``, centred by row. What sets two networks apart is measured there, as their
            embeddings differ in width.
        theirs: The teacher's, for a student.
    """
    used = embedding[:, embedding.abs().amax(0) > 0]
    centred = used - used.mean(0)
    found = {
        "channels": 100 * used.shape[1] / embedding.shape[1],
        "off_diagonal": off_diagonal(self_similarity(used)),
        "off_diagonal_centred": off_diagonal(self_similarity(centred)),
        "rank": effective_rank(used),
        "rank_centred": effective_rank(centred),
        "uniformity": uniformity(rows),
        "distance": torch.pdist(F.normalize(rows)).mean(),
    }
    if theirs is not None:
        found["coral"] = CORALLoss()(logits, theirs)
        found["eq5"] = F.mse_loss(self_similarity(logits), self_similarity(theirs))
    return {name: float(value) for name, value in found.items()}


def markdown(classifiers: Sequence[Any], networks: Sequence[Any], title: str) -> str:
    """A row a classifier and a column a modality, then a row a measure and a column a network."""
    accuracies = _by(classifiers, "classifier", lambda run: {run["modality"]: run["accuracy"]})
    lines = [[name, *(_shown(own[m]) for m in _MODALITIES)] for name, own in accuracies.items()]
    text = table(f"Accuracy % of classifiers, {title}", ["", *_MODALITIES], lines)
    numbers = _by(networks, "method", lambda run: {"accuracy": run["accuracy"], **run["structure"]})
    lines = [
        [told, *(_shown(own.get(name, [])) for own in numbers.values())]
        for name, told in MEASURES.items()
    ]
    return f"{text}\n{table(f'Dimensional structure, {title}', ['', *numbers], lines)}"


def _by(
    runs: Sequence[Any], name: str, read: Callable[[Any], Mapping[str, float]]
) -> dict[str, dict[str, list[float]]]:
    """What is read of runs that did not fail, by an entry and by name, a number a seed."""
    found: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        for kind, value in {} if "failed" in run else read(run).items():
            values = found.setdefault(run[name], {}).setdefault(kind, [])
            values.append(value)
    return found


def _shown(values: Sequence[float]) -> str:
    if not values:
        return "—"
    digits = 1 if abs(values[0]) >= 100 else 2 if abs(values[0]) >= 0.1 else 4
    text = f"{statistics.fmean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.{digits}f}"


def draw_classifiers(runs: Sequence[Any], path: Path, *, title: str) -> None:
    """DSKD's Fig. 1(a): a bar a modality, its seeds as dots."""
    accuracies = _by(runs, "classifier", lambda run: {run["modality"]: run["accuracy"]})
    with drawing(path, (6.4, 3.4)) as figure:
        axes = figure.subplots()
        for side, (modality, colour) in enumerate({"rich": PALETTE[0], "poor": LONE}.items()):
            for place, own in enumerate(accuracies.values()):
                values, at = own.get(modality, []), place + 0.4 * side - 0.2
                if values:
                    label = modality if place == 0 else None
                    axes.bar(at, statistics.fmean(values), 0.36, color=colour, label=label)
                    axes.scatter(np.full(len(values), at), values, s=8, color="#222222", zorder=3)
        axes.set_xticks(range(len(accuracies)), list(accuracies), rotation=15)
        axes.set(ylabel="accuracy, %", ylim=(0, 100))
        below(figure, axes)
        figure.suptitle(f"Accuracy of classifiers, {title}", fontsize=9)
