"""Tables and figures from made-up runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from crossmodal.tables import figures, report

RUNS = [
    {"method": method, "seed": seed, "accuracy": accuracy}
    for method, accuracies in (("alone", (50.0, 52.0)), ("kd", (55.0, 59.0)), ("ds", (60.0, 61.0)))
    for seed, accuracy in enumerate(accuracies)
]
TEACHER = [("teacher resnet14, clean images", 90.0), ("teacher resnet14, poor images", 30.0)]


def test_rows_hold_mean_sample_deviation_and_gain() -> None:
    alone, kd, ds = report.rows(RUNS)
    assert (alone.method, alone.mean, alone.gain) == ("alone", 51.0, None)
    assert alone.std == pytest.approx(2**0.5)  # n - 1
    assert (kd.mean, kd.gain) == (57.0, 6.0)
    assert ds.gained == "+9.50"
    assert kd.accuracy == "57.00 ± 2.83"


def test_one_seed_has_no_deviation_and_no_baseline_no_gain() -> None:
    (row,) = report.rows([{"method": "kd", "accuracy": 40.0}])
    assert (row.std, row.gain, row.accuracy, row.gained) == (None, None, "40.00", "")


def test_failed_seeds_are_told() -> None:
    message = "kd seed 1: the loss of epoch 2 is not finite (loss nan  KD nan); fix: a smaller --lr"
    runs = [*RUNS[:3], {"method": "kd", "seed": 1, "failed": message}]
    kd = report.rows(runs)[1]
    assert (kd.accuracies, kd.gain, kd.failures) == ((55.0,), 4.0, (message,))
    assert kd.accuracy == "55.00 (1 of 2 failed)"
    (gone,) = report.rows(runs[3:])
    assert gone.accuracy == "failed: the loss of epoch 2 is not finite"
    assert (gone.gain, gone.std) == (None, None)


def test_a_figure_keeps_the_place_of_a_method_that_failed(tmp_path: Path) -> None:
    failed = {"method": "dkd", "seed": 0, "failed": "dkd seed 0: it failed"}
    path = tmp_path / "a.png"
    figures.draw_accuracy(report.rows([*RUNS, failed]), TEACHER, path, title="T")
    with Image.open(path) as image:
        assert image.size[0] > 400


def test_markdown() -> None:
    text = report.markdown(report.rows(RUNS), title="T", more=TEACHER)
    assert "| kd | 57.00 ± 2.83 | +6.00 | 2 |" in text
    assert "| *teacher resnet14, poor images* | *30.00* | | 1 |" in text


def test_curves_are_drawn_from_a_history(tmp_path: Path) -> None:
    file = tmp_path / "h.csv"
    file.write_text("epoch,loss,accuracy\n1,2.5,30\n2,1.5,\n")
    history = figures.read_history(file)
    assert history == [{"epoch": 1, "loss": 2.5, "accuracy": 30}, {"epoch": 2, "loss": 1.5}]
    figures.draw_curves({"kd": [history], "at": []}, tmp_path / "c.png", title="T")
    with Image.open(tmp_path / "c.png") as image:
        assert image.size[0] > image.size[1]


@pytest.mark.parametrize("count", [1, 3])
def test_figures_are_drawn(tmp_path: Path, count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    networks = {f"net {n}": torch.randn(30, 8 + n, generator=generator) for n in range(count)}
    rows = report.rows(RUNS[: 2 * count])
    figures.draw_accuracy(rows, TEACHER, tmp_path / "a.png", title="T")
    figures.draw_self_similarity(networks, tmp_path / "s.png")
    labels = torch.arange(30) % 3
    figures.draw_tsne(networks, labels, ["x", "y", "z"], tmp_path / "t.png")
    for name in ("a", "s", "t"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.size[0] > 400
            colours = image.convert("RGB").getcolors(1 << 24)
            assert colours is not None
            assert len(colours) > 10  # not an empty sheet


def test_more_classes_than_hues_still_get_a_figure(tmp_path: Path) -> None:
    features = {"net": torch.randn(40, 8, generator=torch.Generator().manual_seed(0))}
    labels = torch.arange(40) % 20
    figures.draw_tsne(features, labels, [str(n) for n in range(20)], tmp_path / "t.png")
    assert (tmp_path / "t.png").exists()
