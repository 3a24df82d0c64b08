"""The figures, drawn without a display."""

from __future__ import annotations

import csv
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from crossmodal.methods import ALONE
from crossmodal.runs.store import write_atomically
from crossmodal.tables.report import Row
from structkd.diagnostics import effective_rank, self_similarity

# Paul Tol's "muted" scheme: ten hues that stay apart for colour-blind readers.
PALETTE = (
    "#332288",
    "#88CCEE",
    "#44AA99",
    "#117733",
    "#999933",
    "#DDCC77",
    "#CC6677",
    "#882255",
    "#AA4499",
    "#888888",
)
_INK, _ALONE, _DISTILLED = "#222222", "#CC6677", "#332288"
_STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.dpi": 100,
    "savefig.dpi": 200,
}


def draw_accuracy(
    methods: Sequence[Row], teacher: Sequence[tuple[str, float]], path: Path, *, title: str
) -> None:
    """A line a method: every seed a dot, mean and standard deviation; the teacher in the caption.

    A method that failed with every seed keeps its place and says so.
    """
    width = 6.4
    with drawing(path, (width, 1.5 + 0.32 * len(methods))) as figure:
        axes = figure.subplots()
        for place, row in enumerate(methods):
            if not row.accuracies:
                axes.text(0.02, place, "failed", transform=axes.get_yaxis_transform(), va="center")
                continue
            colour = _ALONE if row.method == ALONE else _DISTILLED
            dots = np.full(len(row.accuracies), place)
            axes.errorbar(row.mean, place, xerr=row.std, fmt="|", color=_INK, capsize=3)
            axes.scatter(row.accuracies, dots, s=22, color=colour, alpha=0.7, linewidths=0)
            told = (1.02, place)
            axes.text(*told, row.accuracy, transform=axes.get_yaxis_transform(), va="center")
            if row.method == ALONE:
                axes.axvline(row.mean, color=_ALONE, linestyle=":", linewidth=1, zorder=0)
        axes.margins(x=0.08)
        axes.set_ylim(len(methods) - 0.4, -0.6)
        axes.set_yticks(range(len(methods)), [textwrap.shorten(r.method, 44) for r in methods])
        axes.grid(axis="x", color="#DDDDDD", linewidth=0.6)
        axes.set_axisbelow(True)
        caption = "; ".join(f"{name}: {accuracy:.2f} %" for name, accuracy in teacher)
        axes.set_xlabel(f"accuracy, %\n{_wrapped(caption, width)}".strip())
        figure.suptitle(_wrapped(title, width), fontsize=9)


def draw_curves(
    histories: Mapping[str, Sequence[Sequence[Mapping[str, float]]]], path: Path, *, title: str
) -> None:
    """The loss, and the accuracy in training, over the epochs; every seed a line."""
    shown = {name: found for name, found in histories.items() if found}
    if not shown:
        return
    with drawing(path, (8.2, 3.6)) as figure:
        panels = figure.subplots(1, 2)
        colours = matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, len(shown)))
        if len(shown) <= len(PALETTE):
            colours = PALETTE
        names = {"loss": "loss", "accuracy": "accuracy in training, %"}
        for axes, (column, label) in zip(panels, names.items(), strict=True):
            for (name, found), colour in zip(shown.items(), colours, strict=False):
                for number, history in enumerate(found):
                    kept = [row for row in history if column in row]
                    axes.plot(
                        [row["epoch"] for row in kept],
                        [row[column] for row in kept],
                        color=colour,
                        linewidth=1,
                        label=textwrap.shorten(name, 44) if number == 0 else None,
                    )
            axes.set_title(label)
            axes.set_xlabel("epoch")
            axes.xaxis.get_major_locator().set_params(integer=True)
        figure.suptitle(_wrapped(title, 8.2), fontsize=9)
        handles, labels = panels[0].get_legend_handles_labels()
        longest = max(len(label) for label in labels)
        columns = max(min(4, len(labels), 100 // (longest + 8)), 1)
        figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def read_history(path: Path) -> list[dict[str, float]]:
    """The rows of a training's CSV."""
    with path.open() as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def draw_self_similarity(embeddings: Mapping[str, Tensor], path: Path) -> None:
    """The paper's Fig. 2(a-b): |cosine| between the channels of each network's output embedding."""
    with drawing(path, (3.0 * len(embeddings) + 0.6, 3.4)) as figure:
        panels = figure.subplots(1, len(embeddings), squeeze=False)[0]
        for axes, (name, embedding) in zip(panels, embeddings.items(), strict=True):
            matrix = self_similarity(embedding).abs()
            width = len(matrix)
            others = (matrix.sum() - matrix.diagonal().sum()) / max(width * (width - 1), 1)
            rank = float(effective_rank(embedding))
            image = axes.imshow(matrix.numpy(), vmin=0, vmax=1, cmap="viridis")
            axes.set_title(
                f"{name}\nmean off-diagonal {float(others):.2f}\n"
                f"effective rank {rank:.1f} of {width}"
            )
            axes.set_xlabel("channel")
            axes.spines[:].set_visible(True)
        panels[0].set_ylabel("channel")
        figure.colorbar(image, ax=list(panels), label="|cosine similarity|", shrink=0.8)


def draw_tsne(
    features: Mapping[str, Tensor], labels: Tensor, classes: Sequence[str], path: Path
) -> None:
    """The paper's Fig. 2(c-d): t-SNE of each network's pooled intermediate features, by class."""
    from sklearn.manifold import TSNE

    many = len(classes) > len(PALETTE)
    palette = matplotlib.colormaps["turbo"](np.linspace(0, 1, len(classes))) if many else PALETTE
    colours = [palette[label] for label in labels.tolist()]
    with drawing(path, (3.0 * len(features), 3.5)) as figure:
        panels = figure.subplots(1, len(features), squeeze=False)[0]
        for axes, (name, rows) in zip(panels, features.items(), strict=True):
            perplexity = min(30.0, (len(rows) - 1) / 3)
            places = TSNE(
                init="pca", perplexity=perplexity, learning_rate="auto", random_state=0
            ).fit_transform(rows.numpy())
            axes.scatter(*places.T, c=colours, s=6, linewidths=0)
            axes.set_title(name)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(True)
        if not many:
            handles = [
                matplotlib.lines.Line2D([], [], marker="o", linestyle="", color=colour, label=name)
                for colour, name in zip(palette, classes, strict=False)
            ]
            figure.legend(handles=handles, loc="outside lower center", ncols=5, handletextpad=0.2)


def _wrapped(text: str, inches: float) -> str:
    return textwrap.fill(text, int(12 * inches))  # about 12 letters of 9 pt an inch


@contextmanager
def drawing(path: Path, inches: tuple[float, float]) -> Iterator[Figure]:
    """A figure of this size in the common style, written when the block is left."""
    # Figure itself, not pyplot: no global state, no window, the Agg canvas whatever the machine.
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=inches, layout="constrained")
        yield figure
        write_atomically(path, figure.savefig)
