"""The tables and figures of a finished job, in ``--out`` and on the console."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from rich.markdown import Markdown

from crossmodal.data.sources import stratified
from crossmodal.methods import ALONE, METHODS
from crossmodal.methods.variants import VARIANTS
from crossmodal.runs.session import Run, Session
from crossmodal.runs.store import key, lock, write_atomically
from crossmodal.tables import figures, matches, published, report
from crossmodal.tables.samples import draw_samples
from crossmodal.training import evaluation

_PARTS = re.MULTILINE | re.DOTALL
_PREDICTED_IMAGES = 256
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
    model, facts = job.models["teacher"], session.facts
    teacher = [(f"teacher {model}, {name} images", value) for name, value in facts.items()]
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
    if kind == "train" and not job.matched:
        body += _predictable(session)
    session.console.print(Markdown(body))
    number = _put(job.out / "results.md", body, job.command)

    def figure(name: str) -> Path:
        return job.out / (f"{name}.png" if number == 1 else f"{name}-{number}.png")

    figures.draw_accuracy(rows, teacher, figure("accuracy"), title=title)
    histories: dict[str, list[list[dict[str, float]]]] = {}
    for asked in job.asked:
        names = (session.settings.checkpoint(asked, seed).name for seed in job.seeds)
        paths = (job.out / "history" / f"{name}.csv" for name in names)
        kept = [figures.read_history(path) for path in paths if path.exists()]
        histories[asked.label] = kept
    figures.draw_curves(histories, figure("curves"), title=title)
    if job.matched:
        told = f"{job.entry.name}: from the teacher's features to the student's"
        matches.draw_transport(runs, figure("transport"), title=told)
    elif kind == "train":
        _draw_features(session, rows, figure)
    session.say(f"results, table and figures: {job.out}")


def _put(path: Path, body: str, command: str) -> int:
    """Put a command's section into the file, in its old place or at the end; its place from 1."""
    mark = f"<!-- {key({'command': command})} -->"
    with lock(path.parent, path.name):  # another command may end now
        old = path.read_text() if path.exists() else ""
        sections = re.findall(
            r"^(<!-- [0-9a-f]{8} -->)\n(.*?)(?=^<!-- [0-9a-f]{8} -->|\Z)", old, _PARTS
        )
        texts = dict(sections) | {mark: f"{body}\nMade by `{command}`.\n\n"}
        whole = "".join(f"{name}\n{text}" for name, text in texts.items())
        write_atomically(path, lambda file: file.write_text(whole))
    return list(texts).index(mark) + 1


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
    head = ["method", "accuracy % (gain)", "seeds", *([f"paper, {name}"] if found else [])]
    theirs = [f"{printed['teacher']:.2f}"] if found else []
    lines = [
        ["Baseline-T, clean images", f"{facts['clean']:.2f}", "1", *theirs],
    ]
    if "poor" in facts:
        lines.append(["Baseline-T, poor images", f"{facts['poor']:.2f}", "1"])
    for family in ("baseline", *FAMILIES):
        members = [row for row in rows if _family(row.method) == family]
        if members and family in FAMILIES:
            lines.append([f"*{FAMILIES[family]}*"])
        for row in members:
            gain = "" if row.gain is None else f" ({_arrow(row.gain)})"
            cells = [_title(row.method), row.accuracy + gain, str(len(row.accuracies))]
            lines.append(cells + ([_theirs(row.method, printed)] if found else []))
    told = (
        f"The paper's column is {name}, 300 epochs; ours is {job.recipes['student'].epochs}: "
        "compare the order of the methods and the sizes of the gains, not the accuracies."
        if found
        else f"No published column: the paper has {' -> '.join(published.networks())}, ours is "
        f"{teacher} -> {student} on {job.entry.name}."
    )
    return f"{report.table(title, head, lines)}\n{told}\n"


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


def _predictable(session: Session) -> str:
    """What the lone student's maps tell of the teacher's, where it was trained."""
    job, views = session.job, session.views
    asked = next((asked for asked in job.asked if asked.label == ALONE), None)
    if asked is None:
        return ""
    student = session.new_student()
    if not session.settings.checkpoint(asked, job.seeds[0]).load_into(student):
        return ""
    labels = views.held_out_rich.labels
    rows = torch.from_numpy(stratified(labels.numpy(), _PREDICTED_IMAGES, draw=0))
    sides = (images.chosen(rows) for images in (views.held_out_poor, views.held_out_rich))
    like = views.poor, views.rich
    shares = evaluation.predictable(student, session.teacher, *sides, like)
    told = ", ".join(f"{100 * share:.0f} %" for share in shares)
    return (
        f"\nOf the teacher's maps, a linear map of the lone student's predicts {told} (stage by "
        "stage, held-out images).\n"
    )


# Figures of the first seed's networks.


def _draw_features(
    session: Session, rows: Sequence[report.Row], figure: Callable[[str], Path]
) -> None:
    job, views = session.job, session.views
    teacher = f"teacher ({job.models['teacher']}, clean)"
    networks = {teacher: (session.teacher, views.held_out_rich, views.rich)}
    distilled = [row.method for row in rows if row.accuracies and row.method != ALONE]
    # The lone student and DS where they were run; else the last method stands for DS.
    chosen = {ALONE, "ds" if "ds" in distilled else (distilled or [ALONE])[-1]}
    students = {}
    for asked in job.asked:
        method, student = asked.label, session.new_student()
        if not session.settings.checkpoint(asked, job.seeds[0]).load_into(student):
            session.say(f"{method}: its weights were not kept, it is left out of the figures")
            continue
        students[method] = student
        if method not in chosen:
            continue
        name = "student alone (poor)" if method == ALONE else f"student, {method} (poor)"
        networks[name] = (student, views.held_out_poor, views.poor)
    rgb = job.entry.rgb
    held_out = views.held_out_rich, views.held_out_poor
    draw_samples(*held_out, views.poor, students, rgb, figure("samples"))
    labels = views.held_out_rich.labels
    shown = torch.from_numpy(stratified(labels.numpy(), _FIGURE_IMAGES, draw=0))
    embeddings, pooled = {}, {}
    for name, (network, images, like) in networks.items():
        embeddings[name], pooled[name] = evaluation.features(network, images.chosen(shown), like)
    figures.draw_self_similarity(embeddings, figure("self_similarity"))
    figures.draw_tsne(pooled, labels[shown], views.rich.classes, figure("tsne"))
