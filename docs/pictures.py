"""Draws the docs' three diagrams into figures/: ``python docs/pictures.py``."""

import sys
import textwrap
from pathlib import Path

import numpy as np
import torch
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from papers.figures import PALETTE, drawing
from structkd import LagrangianPlanner, views

FIGURES = Path(__file__).parent / "figures"
INDIGO, CYAN, SAND, ROSE, INK = (
    PALETTE[0],
    PALETTE[1],
    PALETTE[5],
    PALETTE[6],
    "#222222",
)


def _page(figure, width, height):
    axes = figure.add_subplot()
    axes.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    axes.axis("off")
    return axes


def _box(axes, x, y, width, height, text, colour, alpha=0.25):
    style = "round,pad=0,rounding_size=0.12"
    shape = FancyBboxPatch(
        (x, y), width, height, boxstyle=style, fc=colour, ec=INK, lw=0.8
    )
    shape.set_facecolor((*_rgb(colour), alpha))
    axes.add_patch(shape)
    axes.text(
        x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=8
    )


def _rgb(colour):
    return tuple(int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5))


def _arrow(axes, start, end, colour=INK, **options):
    style = {
        "arrowstyle": "-|>",
        "mutation_scale": 9,
        "lw": 1,
        "color": colour,
    } | options
    axes.add_patch(FancyArrowPatch(start, end, shrinkA=0, shrinkB=0, **style))


def capture_points(path):
    """A network's stages, classifier and the names by which criteria read them."""
    with drawing(path, (7.4, 2.3)) as figure:
        axes = _page(figure, 14.8, 4.4)
        axes.text(0.1, 2.9, "image", va="center", fontsize=8)
        names = ["layer1", "layer2", "layer3", "layer4", "pool", "fc"]
        places = [1.5 + 2.1 * number for number in range(6)]
        _arrow(axes, (0.95, 2.9), (places[0], 2.9))
        for number, (name, x) in enumerate(zip(names, places, strict=True)):
            height = 2.2 - 0.35 * number if number < 4 else 0.8
            _box(
                axes,
                x,
                2.9 - height / 2,
                1.35,
                height,
                name,
                CYAN if number < 4 else SAND,
            )
            _arrow(axes, (x + 1.35, 2.9), (x + 2.1, 2.9))
        axes.text(places[-1] + 2.15, 2.9, "answer", va="center", fontsize=8)
        reads = [
            (places[2] - 0.38, '"layer2"', "intermediate", "(B, C, H, W)"),
            (places[3] - 0.38, '"layer3"', "intermediate", "(B, C, H, W)"),
            (places[5] - 0.38, '"fc:input"', "embedding", "(B, D)"),
            (places[5] + 1.72, "output", "logits", "(B, K)"),
        ]
        for x, *lines in reads:
            _arrow(axes, (x, 2.9), (x, 1.45), INDIGO)
            for line, y in zip(lines, (1.2, 0.7, 0.2), strict=True):
                family = "monospace" if line == lines[0] else "sans-serif"
                axes.text(
                    x, y, line, color=INDIGO, ha="center", fontsize=8, family=family
                )


def free_pairs(path):
    """A batch of own images and made ones: who sees which, and what is compared."""
    scenes = torch.tensor(
        [[0.15, 0.4, 0.75], [0.8, 0.3, 0.2], [0.3, 0.65, 0.3], [0.6, 0.3, 0.7]]
    )
    rich = torch.stack([_scene(colour, seed) for seed, colour in enumerate(scenes)])
    draw = torch.Generator().manual_seed(3)
    grey = views.luma(rich)
    poor = views.salt_and_pepper(grey, 0.15, generator=draw)
    with drawing(path, (7.4, 3.5)) as figure:
        axes = _page(figure, 14.8, 7)
        rows = [5.0, 3.5, 2.0, 0.5]
        for y, image, own in zip(
            rows, poor, [True, True, False, False], strict=True
        ):
            colour = ROSE if own else INDIGO
            _picture(axes, image[0], 4.1, y, colour)
            _arrow(axes, (5.6, y + 0.6), (7.3, y + 0.6))
        for y, image in zip(rows[2:], rich[2:], strict=True):
            _picture(axes, image.permute(1, 2, 0), 0.9, y, INDIGO)
            _arrow(axes, (2.3, y + 0.6), (4.0, y + 0.6), INDIGO)
            axes.text(
                3.15, y + 0.75, "made poor", ha="center", fontsize=8, color=INDIGO
            )
        axes.text(
            1.5,
            5.6,
            "the student's\nown images",
            ha="center",
            va="center",
            fontsize=9,
            color=ROSE,
        )
        axes.text(
            1.5,
            3.9,
            "the teacher's\nrich images",
            ha="center",
            va="center",
            fontsize=9,
            color=INDIGO,
        )
        axes.text(4.75, 6.5, "one batch", ha="center", fontsize=9)
        _box(axes, 7.4, 0.4, 1.7, 5.9, "student", CYAN)
        _box(axes, 12.2, 0.4, 1.7, 2.9, "teacher", SAND)
        for y in rows[:2]:
            _arrow(axes, (9.1, y + 0.6), (9.9, y + 0.6))
            axes.text(
                10.0, y + 0.6, "labels only", va="center", fontsize=8, color=ROSE
            )
        for y in rows[2:]:
            _arrow(
                axes, (9.2, y + 0.6), (12.1, y + 0.6), INDIGO, arrowstyle="<|-|>"
            )
            axes.text(
                10.65,
                y + 0.75,
                "distilled, and labels",
                ha="center",
                fontsize=8,
                color=INDIGO,
            )
        axes.plot([1.5, 1.5, 13.05], [0.35, 0.08, 0.08], color=INDIGO, lw=1)
        _arrow(axes, (13.05, 0.08), (13.05, 0.4), INDIGO)


def plan(path):
    """The same costs under the planner's three constraints."""
    draw = torch.Generator().manual_seed(4)
    cost = torch.rand(6, 6, generator=draw)
    cost[:, 1] *= 0.25  # one teacher sample that everybody likes
    plans = {
        "the costs": cost,
        "rows: no limit": LagrangianPlanner(0.1)(cost).plan,
        "capacity: at most a third a column": LagrangianPlanner(0.1, "capacity")(
            cost, capacity=1 / 3
        ).plan,
        "both: every column alike": LagrangianPlanner(0.1, "both")(cost).plan,
    }
    with drawing(path, (7.4, 2.6)) as figure:
        for axes, (title, matrix) in zip(
            figure.subplots(1, 4), plans.items(), strict=True
        ):
            is_cost = matrix is cost
            top = 1 if is_cost else 1 / 6
            axes.imshow(
                matrix, cmap="Greys" if is_cost else "Purples", vmin=0, vmax=top
            )
            axes.set_title(textwrap.fill(title, 20), fontsize=8)
            axes.set(
                xticks=[],
                yticks=[],
                xlabel="teacher samples",
                ylabel="student samples",
            )
            axes.spines[:].set_visible(True)
            if not is_cost:
                axes.set_ylabel("")
                for column, share in enumerate(matrix.sum(0)):
                    axes.text(
                        column,
                        6,
                        f"{100 * share:.0f}",
                        ha="center",
                        va="center",
                        fontsize=7,
                    )
                axes.set_xlabel("mass a column, %", labelpad=20)


def _scene(colour, seed, side=24):
    """A smooth landscape with a lake, of these colours."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side
    waves = sum(
        np.sin(
            2 * np.pi * (random.integers(1, 3) * x + random.integers(0, 3) * y)
            + phase
        )
        for phase in random.uniform(0, 6, 4)
    )
    land = 0.75 + 0.08 * waves
    lake = (waves > 1.2)[None]
    image = torch.tensor(land, dtype=torch.float32) * colour[:, None, None] + 0.15
    water = torch.tensor([0.05, 0.15, 0.5])[:, None, None]
    return torch.where(torch.tensor(lake), water, image).clamp(0, 1)


def _picture(axes, image, x, y, colour):
    axes.imshow(
        image,
        extent=(x, x + 1.3, y, y + 1.3),
        cmap="gray",
        vmin=0,
        vmax=1,
        zorder=2,
    )
    axes.add_patch(
        FancyBboxPatch(
            (x, y),
            1.3,
            1.3,
            boxstyle="square,pad=0",
            fc="none",
            ec=colour,
            lw=1.6,
            zorder=3,
        )
    )
    axes.set(xlim=(0, 14.8), ylim=(0, 7))


if __name__ == "__main__":
    capture_points(FIGURES / "capture_points.png")
    free_pairs(FIGURES / "free_pairs.png")
    plan(FIGURES / "plan.png")
