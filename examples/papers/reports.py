"""One job with the papers' numbers and figures: compare, sweep, figures."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.markdown import Markdown
from torch import Tensor, nn

import models
import train
from data import Batch, Batches, Images
from data.sources import stratified
from methods import ALONE, METHODS, Method
from papers import figures, published
from papers.grid import split
from recipe import near, parsed
from store import Run, key, lock, write_atomically
from structkd import FeatureCapture
from structkd.diagnostics import predictable_share
from table import result_table, rows, table

COMPARED = (*(name for name in METHODS if name != "ska"), "[kd, ds]")
SWEEPS = yaml.safe_load(Path(__file__).with_name("sweeps.yaml").read_text())["groups"]
FAMILIES: Mapping[str, str] = {
    "logits": "on logits",
    "features": "on features",
    "relations": "on relations",
    "structure": "on structure (the paper's)",
    "sums": "sums and others",
}
_SAMPLES, _SAMPLE_DRAW = 8, 32  # images of the figure of samples, all classes in proportion
LOOKED_AT = 1000  # t-SNE of more takes minutes and shows less
_PREDICTED = 256  # images whose maps are predicted


@dataclass(frozen=True)
class Compare:
    """Methods on one data set, in the shape of the DSKD paper's Table 2, beside its column."""

    # Rows; all methods by default.
    criterion: tuple[str, ...] = COMPARED


@dataclass(frozen=True)
class Sweep:
    """Candidates for defaults on a validation split, never on test images; the best is first."""

    # Groups of sweeps.yaml; all by default, none where --criterion is given.
    group: tuple[str, ...] = ()
    # More rows.
    criterion: tuple[str, ...] = ()
    # Students of a row.
    seeds: tuple[int, ...] = (0, 1)


def compare(arguments: Sequence[str], command: str) -> int:
    own, others = split(Compare, arguments, "papers compare RECIPE")
    options = replace(
        parsed(others, train.Options, program="papers compare"), criterion=own.criterion
    )
    session = train.Session(options, command)
    return finish(session, "compare", lambda found: compared(session, found))


def sweep(arguments: Sequence[str], command: str) -> int:
    own, others = split(Sweep, arguments, "papers sweep RECIPE")
    options = parsed(others, train.Options, program="papers sweep")
    if any(text.startswith("--evaluate") for text in others):
        raise ValueError("--evaluate: a sweep chooses settings, so it has val; fix: leave it out")
    out = options.out or Path("runs") / f"sweep-{options.recipe}"
    options = replace(options, evaluate="val", seeds=own.seeds, criterion=(ALONE,), out=out)
    session = train.Session(options, command)
    session.methods = candidates(own.group or (() if own.criterion else tuple(SWEEPS)))
    session.methods += [Method.of(text) for text in own.criterion]

    return finish(
        session, "sweep", lambda found: result_table(found, title=title_of(session), more={})
    )


def ablation(arguments: Sequence[str], command: str) -> int:
    """DSKD's Table 6 on any data set: both forms of DSLoss, and what each term is worth to them."""
    options = parsed(arguments, train.Options, program="papers ablation RECIPE")
    session = train.Session(replace(options, criterion=(ALONE,)), command)
    for name, spec in published.tables()["table6"].rows.items():
        session.methods.append(replace(Method.of(spec), label=name))
    return finish(session, "ablation", lambda found: ablated(session, found))


def ablated(session: Any, runs: Sequence[Run]) -> str:
    """What is lost without a term, beside what the paper lost on its radar images."""
    found = {row.method: row for row in rows(runs)}
    lines = []
    for name, row in found.items():
        cells = [name, row.accuracy]
        if name != ALONE:
            whole = found["printed-all" if name.startswith("printed-") else "all"]
            theirs = published.ABLATION[published.of_paper(name)] - published.ABLATION["all"]
            measured = row.accuracies and whole.accuracies and row is not whole
            cells += [f"{row.mean - whole.mean:+.2f}" if measured else ""]
            cells += [f"{theirs:+.2f}" if theirs else ""]
        lines.append(cells)
    head = ("row", "accuracy %", "against the whole", "paper, CML")
    return table(title_of(session), head, lines)


def candidates(groups: Sequence[str]) -> list[Method]:
    """The methods of groups of ``sweeps.yaml``, each once, by their names there."""
    found = {}
    for name in groups:
        if name not in SWEEPS:
            hint = f"{near(name, SWEEPS)}known: {', '.join(SWEEPS)}"
            raise ValueError(f"--group: unknown {name!r}; {hint}")
        for label, spec in SWEEPS[name].items():
            text = yaml.safe_dump(spec, default_flow_style=True, width=10_000).strip()
            found[label] = replace(Method.of(text.removesuffix("\n...")), label=label)
    return list(found.values())


def drawn(arguments: Sequence[str], command: str) -> int:
    session = train.Session(parsed(arguments, train.Options, program="papers figures"), command)

    def body(found: Sequence[Run]) -> str:
        return result_table(found, title=title_of(session), more=teacher_of(session)) + _looked(
            session
        )

    return finish(session, "figures", body)


def finish(session: Any, name: str, body: Callable[[Sequence[Run]], str], mark: str = "") -> int:
    """Train what is missing, print the report, write it with its figures; 1 where a row failed.

    A second command in one folder adds its section and numbers its figures, as does another
    ``mark``. A sweep has its best row first.
    """
    runs = session.run()
    failed = any("failed" in run for run in runs)
    if not session.leads or session.helper:
        return int(failed)
    if name == "sweep":
        means = {row.method: -row.mean if row.accuracies else 0.0 for row in rows(runs)}
        runs.sort(key=lambda run: means[run["method"]])
    text, found, title = body(runs), rows(runs), title_of(session)
    if failed:
        told = [f"- {row.method}: {error}" for row in found for error in row.failures]
        text += "\nFailed:\n\n" + "\n".join(told) + "\n"
    session.console.print(Markdown(text))
    number = _put(session.out / f"{name}.md", text, session.command, mark)
    ending = ".png" if number == 1 else f"-{number}.png"
    place = session.out / f"{name}-accuracy{ending}"
    facts = ", ".join(f"{value:.2f}\u00a0% on {what}" for what, value in session.facts.items())
    told = f"teacher {session.options.teacher}: {facts}" if facts else ""
    panel = figures.Panel({row.method: row for row in found}, caption=told)
    figures.draw_accuracy([panel], place, title=title)
    histories = {}
    for method in session.methods:
        kept = (session.student_checkpoint(method, s).name for s in session.options.seeds)
        paths = (session.out / "history" / f"{one}.csv" for one in kept)
        histories[method.label] = [figures.read_history(path) for path in paths if path.exists()]
    figures.draw_curves(histories, session.out / f"{name}-curves{ending}", title=title)
    session.show.say(f"report and figures: {session.out}")
    return int(failed)


def _put(path: Path, body: str, command: str, mark: str) -> int:
    """Put a command's section into the file, in its old place or at the end; its place from 1."""
    mark = f"<!-- {key({'command': command, 'mark': mark})} -->"
    pattern = r"^(<!-- [0-9a-f]{8} -->)\n(.*?)(?=^<!-- [0-9a-f]{8} -->|\Z)"
    with lock(path.parent, path.name):  # another command may end now
        old = path.read_text() if path.exists() else ""
        texts = dict(re.findall(pattern, old, re.MULTILINE | re.DOTALL))
        texts[mark] = f"{body}\nMade by `{command}`.\n\n"
        whole = "".join(f"{name}\n{text}" for name, text in texts.items())
        write_atomically(path, lambda file: file.write_text(whole))
    return list(texts).index(mark) + 1


def title_of(session: Any) -> str:
    options = session.options
    kind = "validation images, " if options.evaluate == "val" else ""
    poor = session.views.poverty
    return f"{options.recipe}, {session.title} ({kind}{poor}), student {options.student}"


def teacher_of(session: Any) -> dict[str, float]:
    model = session.options.teacher
    return {f"teacher {model}, {name}": value for name, value in session.facts.items()}


# The comparison, in the shape of the DSKD paper's Table 2.


def compared(session: Any, runs: Sequence[Run]) -> str:
    options, facts = session.options, session.facts
    found = published.column(options.recipe, options.teacher, options.student)
    name, printed = found or ("", {})
    head = ["method", "accuracy % (gain)", "seeds", *([f"paper, {name}"] if found else [])]
    shown = [f"{printed['teacher']:.2f}"] if found else []
    lines = [["Baseline-T, clean images", f"{facts['clean images']:.2f}", "1", *shown]]
    if "poor images" in facts:
        lines.append(["Baseline-T, poor images", f"{facts['poor images']:.2f}", "1"])
    for family in ("baseline", *FAMILIES):
        members = [
            row
            for row in rows(runs)
            if METHODS.get(row.method.lower(), {}).get("family", "sums") == family
        ]
        if members and family in FAMILIES:
            lines.append([f"*{FAMILIES[family]}*"])
        for row in members:
            names = parts(row.method)
            shown = "+".join(METHODS.get(part, {}).get("title", part) for part in names)
            gain = "" if row.gain is None else f" ({_arrow(row.gain)})"
            cells = [shown, row.accuracy + gain, str(len(row.accuracies))]
            lines.append(cells + ([theirs(names, printed)] if found else []))
    networks = f"{options.teacher} -> {options.student}"
    told = (
        f"The paper's column is {name}, {published.PROTOCOL['epochs']} epochs; ours is "
        f"{options.epochs}: compare the order of the methods and the sizes of the gains, not the "
        "accuracies."
        if found
        else f"No published column: the paper has {' -> '.join(published.NETWORKS)}, ours is "
        f"{networks} on {options.recipe}."
    )
    return f"{table(title_of(session), head, lines)}\n{told}\n"


def parts(label: str) -> list[str]:
    """The names that a sum of methods is made of, or the label as it is."""
    spec = yaml.safe_load(label)
    return spec if isinstance(spec, list) and all(isinstance(s, str) for s in spec) else [label]


def theirs(names: Sequence[str], printed: Mapping[str, float]) -> str:
    # Table 7 has each sum once; nothing depends on the order of its parts.
    wanted = {published.of_paper(name.lower()) for name in names}
    accuracy = next((printed[name] for name in printed if set(name.split("+")) == wanted), None)
    if accuracy is None:
        return ""
    return f"{accuracy:.2f}" + (
        "" if wanted == {ALONE} else f" ({_arrow(accuracy - printed[ALONE])})"
    )


def _arrow(gain: float) -> str:
    return f"{'↓' if gain < 0 else '↑'}{abs(gain):.2f}"


# What the first seed's networks see, as figures and in a line.


def _looked(session: Any) -> str:
    """Draw samples, self-similarity and t-SNE; what the lone student's maps tell of the teacher's.

    Weights are kept of the first seed alone; of a student that has none it is said.
    """
    views, teacher = session.views, session.teacher
    rich, poor = views.held_out_rich, views.held_out_poor
    students: dict[str, nn.Module] = {}
    for method in session.methods:
        student = session.network("student", 0)
        if session.student_checkpoint(method, session.options.seeds[0]).load_into(student) is None:
            session.show.say(f"{method.label}: its weights were not kept, no figure shows it")
        else:
            students[method.label] = student

    def sample(count: int, draw: int = 0) -> Tensor:
        return torch.from_numpy(stratified(poor.labels.numpy(), count, draw=draw))

    few = sample(_SAMPLES, _SAMPLE_DRAW)
    said = {
        name: [k for b in _still(poor.chosen(few), views.poor) for k in predicted(student, b)]
        for name, student in students.items()
    }
    out, many = session.out, sample(LOOKED_AT)
    few_rich, few_poor = rich.chosen(few), poor.chosen(few)
    figures.draw_samples(few_rich, few_poor, said, session.options.rgb, out / "samples.png")
    # The lone student and DS where they were run; else the last method stands for DS.
    distilled = [name for name in students if name != ALONE]
    chosen = [ALONE, "ds" if "ds" in distilled else (distilled or [ALONE])[-1]]
    networks = {f"teacher ({session.options.teacher}, clean)": (teacher, rich, views.rich)}
    for name in dict.fromkeys(name for name in chosen if name in students):
        told = "student alone (poor)" if name == ALONE else f"student, {name} (poor)"
        networks[told] = (students[name], poor, views.poor)
    looks = {
        name: look(net, side.chosen(many), like) for name, (net, side, like) in networks.items()
    }
    embeddings = {name: embedding for name, (embedding, _) in looks.items()}
    inner = {name: pooled(maps) for name, (_, maps) in looks.items()}
    figures.draw_self_similarity(embeddings, out / "self_similarity.png")
    figures.draw_tsne(inner, poor.labels[many], poor.classes, out / "tsne.png")
    if ALONE not in students:
        return ""
    some = sample(_PREDICTED)
    _, own = look(students[ALONE], poor.chosen(some), views.poor)
    _, theirs = look(teacher, rich.chosen(some), views.rich)
    shares = (predictable_share(*pair) for pair in zip(own, theirs, strict=False))
    told = ", ".join(f"{100 * float(share.clamp_min(0).mean()):.0f} %" for share in shares)
    return (
        f"\nOf the teacher's maps, a linear map of the lone student's predicts {told} (stage by "
        "stage, held-out images).\n"
    )


def _still(images: Images, like: Images) -> Iterator[Batch]:
    """All images as they are, normalised as ``like``."""
    return Batches(train.Options(), poor=replace(images, like=like, targets=None)).still()


@torch.no_grad()
def predicted(student: nn.Module, batch: Batch) -> list[int]:
    return [int(k) for k in student.cpu().eval()(batch.poor).argmax(1)]


@torch.no_grad()
def look(network: nn.Module, images: Images, like: Images) -> tuple[Tensor, list[Tensor]]:
    """Embeddings (N, D) and the maps of every stage of all images."""
    names, found = models.stage_names(network), []
    with FeatureCapture(network.cpu().eval(), intermediate=names) as capture:
        found = [capture(batch.poor) for batch in _still(images, like)]
    stages = zip(*(features.intermediate for features in found), strict=True)
    return torch.cat([f.embedding for f in found]), [torch.cat(stage) for stage in stages]


def pooled(maps: Sequence[Tensor]) -> Tensor:
    """The last stage but one, averaged over its positions: (N, C)."""
    chosen = maps[max(len(maps) - 2, 0)]
    return chosen.mean((2, 3)) if chosen.ndim == 4 else chosen.mean(1)
