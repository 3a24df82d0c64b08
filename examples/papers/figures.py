"""The figures, drawn without a display."""

from __future__ import annotations

import csv
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from numpy.typing import NDArray
from torch import Tensor

from data import Images
from methods import ALONE
from progress import CHECKSUM, row_checksum
from store import write_atomically
from structkd.diagnostics import effective_rank, self_similarity
from table import Row

# Paul Tol's "muted" scheme: ten hues that stay apart for colour-blind readers.
PALETTE = ("#332288", "#88CCEE", "#44AA99", "#117733", "#999933",
           "#DDCC77", "#CC6677", "#882255", "#AA4499", "#888888")  # fmt: skip
LONE = "#CC6677"  # the lone student; no other line has it
_LETTERS = 14  # of 9 pt, about, in an inch
_INK, _DISTILLED, _RIGHT = "#222222", "#332288", "#117733"
_STYLE: Any = dict.fromkeys(("font.size", "axes.titlesize", "axes.labelsize"), 9)
_STYLE |= dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False)
_STYLE |= {"savefig.dpi": 200}
_DIAMOND: Any = {"marker": "D", "s": 18, "facecolors": "white", "edgecolors": LONE, "zorder": 3}
Series = Mapping[str, Sequence[tuple[Sequence[float], Sequence[float]]]]


@contextmanager
def drawing(path: Path, inches: tuple[float, float]) -> Iterator[Figure]:
    """A figure of this size in the common style, written when the block is left."""
    # Figure itself, not pyplot: no global state, no window, the Agg canvas whatever the machine.
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=inches, layout="constrained")
        yield figure
        write_atomically(path, figure.savefig)


@dataclass(frozen=True)
class Panel:
    """Accuracies by the name of their line; None for a line that has none."""

    rows: Mapping[str, Row | None]
    published: Mapping[str, float] = field(default_factory=dict)
    title: str = ""
    caption: str = ""


def draw_accuracy(panels: Sequence[Panel], path: Path, *, title: str) -> None:
    """Every seed a dot, mean and standard deviation; what is published beside them.

    A method that failed with every seed keeps its place and says so.
    """
    across, names = min(len(panels), 3), list(panels[0].rows)
    down = -(-len(panels) // across)
    inches = (max(1.4 + 2.3 * across, 6.4), 0.5 + down * (1.0 + 0.3 * len(names)))
    with drawing(path, inches) as figure:
        places = figure.subplots(down, across, sharey=True, squeeze=False)
        for axes, panel in zip(places.flat, panels, strict=False):
            _accuracies(axes, panel, alone=len(panels) == 1)
        for axes in places.flat[len(panels) :]:
            axes.set_visible(False)
        axes = places[0, 0]
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_yticks(range(len(names)), [textwrap.shorten(name, 44) for name in names])
        if panels[0].published:
            axes.scatter([], [], s=22, color=_DISTILLED, label="ours")
            axes.scatter([], [], **_DIAMOND, label="published")
            figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
        figure.suptitle(wrapped(title, inches[0]), fontsize=9)


def _accuracies(axes: Any, panel: Panel, *, alone: bool) -> None:
    for place, (name, row) in enumerate(panel.rows.items()):
        there, theirs = {"transform": axes.get_yaxis_transform(), "va": "center"}, panel.published
        if row is not None and row.accuracies:
            colour = LONE if row.method == ALONE else _DISTILLED
            if name in theirs:
                axes.plot([row.mean, theirs[name]], [place] * 2, color="#BBBBBB", linewidth=1)
            axes.errorbar(row.mean, place, xerr=row.std, fmt="|", color=_INK, capsize=3)
            dots = np.full(len(row.accuracies), place)
            axes.scatter(row.accuracies, dots, s=22, color=colour, alpha=0.7, linewidths=0)
            if alone:
                axes.text(1.02, place, row.accuracy, **there)
            if row.method == ALONE:
                axes.axvline(row.mean, color=LONE, linestyle=":", linewidth=1, zorder=0)
        elif row is not None:
            axes.text(0.02, place, "failed", **there)
        if name in theirs:
            axes.scatter(theirs[name], place, **_DIAMOND)
    axes.set_title(panel.title, fontsize=8)
    axes.set_xlabel(f"accuracy, %\n{wrapped(panel.caption, 5.4 if alone else 2.2)}".strip())
    axes.margins(x=0.1)
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)


def read_history(path: Path) -> list[dict[str, float]]:
    """A training's epochs.

    Raises:
        ValueError: The file is damaged.
    """
    found = []
    try:
        with path.open(newline="") as file:
            for line in csv.DictReader(file):
                told = line.pop(CHECKSUM, "")  # an older history has none
                row = {name: float(value) for name, value in line.items() if value}
                if told != "" and told != row_checksum(row):
                    raise ValueError(f"epoch {len(found) + 1} has another checksum")
                found.append(row)
    except (ValueError, TypeError, csv.Error) as error:
        raise ValueError(
            f"{path} is damaged ({error}); fix: move it away, and its curve is left out"
        ) from error
    return found


def draw_curves(
    histories: Mapping[str, Sequence[Sequence[Mapping[str, float]]]], path: Path, *, title: str
) -> None:
    """The loss, and the accuracy in training, over the epochs."""
    panels: dict[str, Series] = {}
    for column, label in {"loss": "loss", "accuracy": "accuracy in training, %"}.items():
        panels[label] = {
            name: [
                ([row["epoch"] for row in history], [row.get(column, np.nan) for row in history])
                for history in found
            ]
            for name, found in histories.items()
            if found
        }
    draw_lines(panels, path, title=title, across="epoch")


def draw_transport(
    runs: Sequence[Mapping[str, Any]], path: Path, *, title: str, suffix: str = ""
) -> None:
    """SemBridge's Fig. 2: what it costs to carry the teacher's features to the student's.

    Without a suffix they are logits, each row centred: each network's own classifier takes its
    embedding to the one space that both share, so nothing is fitted and widths need not agree. With
    ``_features`` they are the embeddings. The reference, which the setting does not have, is black.
    """
    names = {
        f"transport{suffix}": "Wasserstein distance",
        f"matched{suffix}": "distance of the matched pairs",
    }
    panels: dict[str, dict[str, list[tuple[Sequence[float], Sequence[float]]]]] = {}
    for kind, label in names.items():
        series = panels.setdefault(label, {})
        for run in runs:
            if costs := run.get("trace", {}).get(kind):
                series.setdefault(run["method"], []).append((range(len(costs)), costs))
    draw_lines(panels, path, title=title, across="epochs done", sharey=True, log=True)


def draw_lines(
    panels: Mapping[str, Series], path: Path, *, title: str, across: str, sharey: bool = False,
    log: bool = False,
) -> None:  # fmt: skip
    """Panels side by side, with one legend; nothing where they have no lines.

    A name's seeds are pale lines and their mean is a strong one.
    """
    if not any(panels.values()):
        return
    with drawing(path, (8.2, 3.8)) as figure:
        places = figure.subplots(1, len(panels), sharey=sharey)
        for axes, (label, series) in zip(places, panels.items(), strict=True):
            for (name, seeds), colour in zip(series.items(), colours(series), strict=True):
                shared = min(len(xs) for xs, _ in seeds)
                mean = np.mean([ys[:shared] for _, ys in seeds], axis=0)
                told, mark = textwrap.shorten(name, 44), "." if shared == 1 else None
                axes.plot(seeds[0][0][:shared], mean, color=colour, marker=mark, label=told)
                for xs, ys in seeds if len(seeds) > 1 else ():
                    axes.plot(xs, ys, color=colour, linewidth=0.7, alpha=0.35)
            axes.set(title=label, xlabel=across)
            if log:
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.yaxis.set_major_formatter("{x:g}")
                axes.yaxis.set_minor_formatter(NullFormatter())
            axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        figure.suptitle(wrapped(title, 8.2), fontsize=9)
        below(figure, places[0])


def below(figure: Figure, axes: Any) -> None:
    """The legend of a panel, under the whole figure and no wider."""
    handles, labels = axes.get_legend_handles_labels()
    room = int(_LETTERS * figure.get_figwidth())
    columns = max(min(4, len(labels), room // (max(map(len, labels)) + 8)), 1)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def colours(names: Collection[str]) -> list[str]:
    """One a name: the lone student and the reference have their own in every figure."""
    fixed = {name: "black" for name in names if name.endswith("(reference)")} | {ALONE: LONE}
    others = [name for name in names if name not in fixed]
    free = [hue for hue in palette(len(others) + 1) if hue != LONE]
    chosen = fixed | dict(zip(others, free, strict=False))
    return [chosen[name] for name in names]


def palette(count: int) -> Sequence[str]:
    if count <= len(PALETTE):
        return PALETTE
    return [to_hex(hue) for hue in matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, count))]


def draw_self_similarity(embeddings: Mapping[str, Tensor], path: Path) -> None:
    """DSKD's Fig. 2(a-b): |cosine| between the channels of each network's output embedding."""
    with _each(embeddings, path, "Self-similarity of the output's channels") as (figure, panels):
        for axes, (name, embedding) in zip(panels, embeddings.items(), strict=True):
            matrix = self_similarity(embedding).abs()
            image = axes.imshow(matrix.numpy(), vmin=0, vmax=1, cmap="viridis")
            rank = f"effective rank {float(effective_rank(embedding)):.1f} of {len(matrix)}"
            axes.set_title(f"{name}\nmean off-diagonal {off_diagonal(matrix):.2f}\n{rank}")
            axes.set(xlabel="channel", ylabel="channel")
        figure.colorbar(image, ax=list(panels), label="|cosine similarity|", shrink=0.8)


def off_diagonal(cosines: Tensor) -> float:
    """Mean |cosine| between two different channels; 0 where there are no two."""
    others, width = cosines.abs().fill_diagonal_(0), len(cosines)
    return float(others.sum() / max(width * (width - 1), 1))


def draw_tsne(
    features: Mapping[str, Tensor], labels: Tensor, classes: Sequence[str], path: Path
) -> None:
    """DSKD's Fig. 2(c-d): t-SNE of each network's pooled intermediate features, by class."""
    from sklearn.manifold import TSNE

    hues, title = palette(len(classes)), "t-SNE of the features of the last stage but one"
    with _each(features, path, title) as (figure, panels):
        for axes, (name, rows) in zip(panels, features.items(), strict=True):
            perplexity = min(30.0, (len(rows) - 1) / 3)
            made = TSNE(init="pca", perplexity=perplexity, random_state=0)
            shown = [hues[label] for label in labels.tolist()]
            axes.scatter(*made.fit_transform(rows.numpy()).T, c=shown, s=6, linewidths=0)
            axes.set(title=name, xticks=[], yticks=[])
        if len(classes) <= len(PALETTE):
            for hue, name in zip(hues, classes, strict=False):
                axes.scatter([], [], color=hue, label=name)
            figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5)


@contextmanager
def _each(networks: Mapping[str, Tensor], path: Path, title: str) -> Iterator[tuple[Figure, Any]]:
    """A panel a network, framed, three to a row where there are more than four."""
    across = len(networks) if len(networks) <= 4 else 3
    down = -(-len(networks) // across)
    with drawing(path, (3.0 * across + 0.6, 3.5 * down)) as figure:
        panels = figure.subplots(down, across, squeeze=False).flatten()
        for axes in panels:
            axes.spines[:].set_visible(True)
        for axes in panels[len(networks) :]:
            axes.set_visible(False)
        figure.suptitle(title, fontsize=9)
        yield figure, panels[: len(networks)]


def draw_samples(
    rich: Images, poor: Images, said: Mapping[str, Sequence[int]], rgb: Sequence[int], path: Path
) -> None:
    """Samples side by side, the rich modality above the poor one, what students say of them below.

    Args:
        rich, poor: The samples.
        said: The class that each student calls every sample.
        rgb: Where red, green and blue stand in the rich images, where they have other bands.
    """
    classes, labels = poor.classes, poor.labels.tolist()
    with drawing(path, (1.15 * len(labels) + 1.0, 2.9 + 0.2 * len(said))) as figure:
        panels = _beside(figure, {"rich": rich, "poor": poor}, rgb)
        below: Any = {"xycoords": "axes fraction", "va": "center"}
        for place, label in enumerate(labels):
            for number, calls in enumerate(said.values()):
                where, colour = (0.5, -0.14 - 0.19 * number), _RIGHT
                if calls[place] != label:
                    colour = LONE
                told = classes[calls[place]]
                panels[1][place].annotate(told, where, ha="center", color=colour, **below)
        for number, name in enumerate(said):
            panels[1][0].annotate(name, (-0.12, -0.14 - 0.19 * number), ha="right", **below)


def draw_matches(
    images: Mapping[str, Images], rgb: Sequence[int], path: Path, *, title: str
) -> None:
    """A line of images each, with its name; those in a column are of one class."""
    count = len(next(iter(images.values())))
    with drawing(path, (1.15 * count + 1.0, 0.6 + 1.15 * len(images))) as figure:
        _beside(figure, images, rgb)
        figure.suptitle(title, fontsize=9)


def _beside(figure: Figure, lines: Mapping[str, Images], rgb: Sequence[int]) -> Any:
    """Lines of as many images each, under the classes of the first; the panels."""
    count = len(next(iter(lines.values())))
    panels = figure.subplots(len(lines), count, squeeze=False)
    for row, (name, images) in zip(panels, lines.items(), strict=True):
        for axes, image in zip(row, images.take(torch.arange(count)).float(), strict=True):
            axes.imshow(visible(image, rgb), cmap="gray", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        row[0].set_ylabel(name)
    first = next(iter(lines.values()))
    for axes, label in zip(panels[0], first.labels.tolist(), strict=True):
        axes.set_title(textwrap.shorten(first.classes[label], 16, placeholder="…"))
    return panels


def visible(image: Tensor, rgb: Sequence[int]) -> NDArray[np.float32]:
    """One image (C, H, W) as (H, W, 3) or (H, W) in [0, 1], from its darkest to its brightest.

    Two in a hundred pixels at either end are cut, as radar has a few that outshine all others.
    """
    # Three bands are red, green and blue already, whatever they were made from.
    bands = list(rgb) if len(rgb) == 3 and max(rgb) < len(image) > 3 else [0, 1, 2]
    shown = image[bands] if len(image) >= 3 else image[:1]
    low, high = (float(shown.quantile(share)) for share in (0.02, 0.98))
    scaled = ((shown - low) / max(high - low, 1e-6)).clamp(0, 1)
    return scaled.permute(1, 2, 0).squeeze(-1).numpy()


def wrapped(text: str, inches: float) -> str:
    return textwrap.fill(text, int(_LETTERS * inches))
