"""The three figures of the main job, drawn without a display."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from crossmodal.report import BASELINE, Row, Teacher
from crossmodal.store import write_atomically
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
    methods: Sequence[Row], teacher: Teacher | None, path: Path, *, title: str
) -> None:
    """Every seed a dot, with mean and standard deviation a method; the teacher in the caption.

    A method that failed with every seed keeps its place and says so.
    """
    width = max(4.8, 1.2 + 0.8 * len(methods))
    with drawing(path, (width, 3.4)) as figure:
        axes = figure.subplots()
        for place, row in enumerate(methods):
            if not row.accuracies:
                axes.text(
                    place, 0.5, "failed", transform=axes.get_xaxis_transform(), ha="center",
                    rotation=90,
                )  # fmt: skip
                continue
            colour = _ALONE if row.method == BASELINE else _DISTILLED
            axes.errorbar(
                place, row.mean, yerr=row.std, fmt="_", color=_INK, capsize=4, markersize=18
            )
            axes.scatter(
                place + 0.22 + np.zeros(len(row.accuracies)),
                row.accuracies,
                s=26,
                color=colour,
                alpha=0.8,
                linewidths=0,
            )
            axes.annotate(
                row.accuracy.replace(" ± ", "\n± "),
                (place, max([*row.accuracies, row.mean + (row.std or 0)])),
                xytext=(0, 6),
                textcoords="offset points",
                ha="center",
            )
            if row.method == BASELINE:
                axes.axhline(row.mean, color=_ALONE, linestyle=":", linewidth=1, zorder=0)
        axes.margins(y=0.18)
        axes.set_xlim(-0.6, len(methods) - 0.4)
        axes.set_xticks(range(len(methods)), [row.method for row in methods])
        axes.set_ylabel("accuracy, %")
        axes.set_title(_wrapped(title, width))
        axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
        axes.set_axisbelow(True)
        if teacher is not None:
            caption = (
                f"teacher {teacher.model}: {teacher.clean:.2f} % on clean images, "
                f"{teacher.poor:.2f} % on poor ones"
            )
            axes.set_xlabel(_wrapped(caption, width), labelpad=8)


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
