"""The tables and figures of a finished job, in ``--out`` and on the console."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from rich.markdown import Markdown
from torch import nn

from crossmodal.data import Images
from crossmodal.data.sources import stratified
from crossmodal.methods import ALONE, METHODS
from crossmodal.methods.variants import VARIANTS
from crossmodal.runs.session import Run, Session
from crossmodal.runs.store import key, write_atomically
from crossmodal.tables import figures, matches, published, report
from crossmodal.training import evaluation

_FIGURE_IMAGES = 1000  # t-SNE of more takes minutes and shows less
FAMILIES: Mapping[str, str] = {
    "logits": "on logits",
    "features": "on features",
    "relations": "on relations",
    "structure": "on structure (the paper's)",
    "sums": "sums",
}


def write(session: Session, runs: Sequence[Run], kind: str) -> None:
    """Print and write the table; draw the figures. ``kind`` is ``train``, ``compare``, ``sweep``.

    A second command in one folder adds its table to ``results.md`` and numbers its figures.
    """
    job, rows = session.job, report.rows(runs)
    title = job.title + (f" ({session.views.poverty})" if job.matched else "")
    teacher = _teacher_lines(session)
    if kind == "sweep":
        rows.sort(key=lambda row: -row.mean if row.accuracies else float("inf"))
    if kind == "compare":
        body = _compared(rows, session, title)
    else:
        body = report.markdown(rows, title=title, more=[] if kind == "sweep" else teacher)
    notes = [f"- {row.method}: {text}" for row in rows for text in row.failures]
    if notes:
        body += "\nFailed:\n\n" + "\n".join(notes) + "\n"
    if job.matched:
        told = filter(None, [matches.rematching_time(runs), _in_the_paper(job.entry.name)])
        body += "".join(f"\n{note}\n" for note in told)
    session.console.print(Markdown(body))
    number = _put(job.out / "results.md", body, job.command)
    figure = _numbered(job.out, number)
    figures.draw_accuracy(rows, teacher, figure("accuracy"), title=title)
    histories = {row.method: _histories(session, row.method) for row in rows}
    figures.draw_curves(histories, figure("curves"), title=title)
    if job.matched:
        told = f"{job.entry.name}: from the teacher's features to the student's"
        matches.draw_transport(matches.costs(runs), figure("transport"), title=told)
    elif kind == "train":
        _draw_features(session, rows, figure)
    session.say(f"results, table and figures: {job.out}")


def _put(path: Path, body: str, command: str) -> int:
    """Put a command's section into the file, in its old place or at the end; its place from 1."""
    mark = f"<!-- {key({'command': command})} -->"
    sections = (
        re.split(r"(?=^<!-- [0-9a-f]{8} -->$)", path.read_text(), flags=re.M)
        if (path.exists())
        else []
    )
    sections = [section for section in sections if section.startswith("<!-- ")]
    text = f"{mark}\n{body}\nMade by `{command}`.\n\n"
    place = next((n for n, old in enumerate(sections) if old.startswith(mark)), len(sections))
    sections[place : place + 1] = [text]
    write_atomically(path, lambda file: file.write_text("".join(sections)))
    return place + 1


def _numbered(out: Path, number: int) -> Callable[[str], Path]:
    return lambda name: out / (f"{name}.png" if number == 1 else f"{name}-{number}.png")


def _teacher_lines(session: Session) -> list[tuple[str, float]]:
    model = session.job.models["teacher"]
    return [(f"teacher {model}, {name} images", v) for name, v in session.facts.items()]


def _in_the_paper(name: str) -> str:
    printed = published.sembridge(name)
    if not printed:
        return ""
    rows = (f"{VARIANTS[row].title.format('kd')} {value:.1f}" for row, value in printed.items())
    return f"The paper, ResNet-34 to ResNet-34, its own split: {', '.join(rows)}."


# The comparison, in the shape of the DSKD paper's Table 2.


def _compared(rows: Sequence[report.Row], session: Session, title: str) -> str:
    job, facts = session.job, session.facts
    teacher, student = job.models["teacher"], job.models["student"]
    found = published.column(job.entry.name, teacher, student)
    name, printed = found or ("", {})
    last = [f"paper, {name}"] if found else []

    def line(*cells: str, paper: str = "") -> str:
        return "| " + " | ".join([*cells, *([paper] if found else [])]) + " |"

    lines = [
        f"{title}:",
        "",
        line("method", "accuracy % (gain)", "seeds", paper="".join(last)),
        "|---|---:|---:|" + ("---:|" if found else ""),
        line("Baseline-T, clean images", f"{facts['clean']:.2f}", "1",
             paper=f"{printed.get('teacher', 0):.2f}"),
    ]  # fmt: skip
    if "poor" in facts:
        lines.append(line("Baseline-T, poor images", f"{facts['poor']:.2f}", "1"))
    for family in ("baseline", *FAMILIES):
        members = [row for row in rows if _family(row.method) == family]
        if members and family in FAMILIES:
            lines.append(line(f"*{FAMILIES[family]}*", "", ""))
        for row in members:
            gain = "" if row.gain is None else f" ({_arrow(row.gain)})"
            theirs = _theirs(row.method, printed)
            seeds = str(len(row.accuracies))
            lines.append(line(_title(row.method), row.accuracy + gain, seeds, paper=theirs))
    told = (
        f"The paper's column is {name}, 300 epochs; ours is {job.recipes['student'].epochs}: "
        "compare the order of the methods and the sizes of the gains, not the accuracies."
        if found
        else f"No published column: the paper has {' -> '.join(published.networks())}, ours is "
        f"{teacher} -> {student} on {job.entry.name}."
    )
    return "\n".join([*lines, "", told, ""])


def _family(method: str) -> str:
    return "sums" if "+" in method else METHODS[method.partition(":")[0]].family


def _title(method: str) -> str:
    parts = (part.partition(":") for part in method.split("+"))
    return "+".join(METHODS[name].title + colon + options for name, colon, options in parts)


def _theirs(method: str, printed: Mapping[str, float]) -> str:
    # Table 7 has each sum once; nothing depends on the order of its parts.
    wanted = set(method.split("+"))
    accuracy = next((printed[name] for name in printed if set(name.split("+")) == wanted), None)
    if accuracy is None:
        return ""
    if method == ALONE:
        return f"{accuracy:.2f}"
    return f"{accuracy:.2f} ({_arrow(accuracy - printed[ALONE])})"


def _arrow(gain: float) -> str:
    return f"{'↓' if gain < 0 else '↑'}{abs(gain):.2f}"


# Figures of the first seed's networks.


def _histories(session: Session, label: str) -> list[list[dict[str, float]]]:
    asked = next(asked for asked in session.job.asked if asked.label == label)
    names = (session.checkpoint(asked, seed).name for seed in session.job.seeds)
    paths = (session.job.out / "history" / f"{name}.csv" for name in names)
    return [figures.read_history(path) for path in paths if path.exists()]


def _draw_features(
    session: Session, rows: Sequence[report.Row], figure: Callable[[str], Path]
) -> None:
    job, views = session.job, session.views
    networks: dict[str, tuple[nn.Module, Images, Images]] = {
        f"teacher ({job.models['teacher']}, clean)": (
            session.teacher, views.held_out_rich, views.rich,
        )
    }  # fmt: skip
    for method in _figure_methods([row.method for row in rows if row.accuracies]):
        asked = next(asked for asked in job.asked if asked.label == method)
        student = session.new_student()
        if not session.checkpoint(asked, job.seeds[0]).load_into(student):
            session.say(f"{method}: its weights were not kept, it is left out of the figures")
            continue
        name = "student alone (poor)" if method == ALONE else f"student, {method} (poor)"
        networks[name] = (student, views.held_out_poor, views.poor)
    labels = views.held_out_rich.labels
    shown = torch.from_numpy(stratified(labels.numpy(), _FIGURE_IMAGES, draw=0))
    features = {
        name: evaluation.features(network, images.chosen(shown), like)
        for name, (network, images, like) in networks.items()
    }
    embeddings = {name: embedding for name, (embedding, _) in features.items()}
    figures.draw_self_similarity(embeddings, figure("self_similarity"))
    pooled = {name: stage for name, (_, stage) in features.items()}
    figures.draw_tsne(pooled, labels[shown], views.rich.classes, figure("tsne"))


def _figure_methods(methods: Sequence[str]) -> list[str]:
    """The lone student and DS where they were run; else the last method stands for DS."""
    distilled = [name for name in methods if name != ALONE]
    second = ["ds"] if "ds" in distilled else distilled[-1:]
    return [name for name in methods if name == ALONE] + second
