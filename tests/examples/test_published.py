"""The papers' accuracies: as in the papers' text, and with the gains that the tables print."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

import pytest
import timm

import models  # noqa: F401  (registers the networks)
from papers import published
from recipe import recipe
from train import Options

ORDER = (
    *("kd", "alkd", "fitnets", "at", "afkd", "nst", "vid", "crd", "semckd"),
    *("rkd", "fsp", "cc", "ds"),
)
# As the paper prints them beside its accuracies, by teacher, student and data set.
GAINS = [
    ("resnet32x4", "resnet8x4", "CML",
     "4.29 3.15 3.89 3.53 3.99 4.93 4.36 5.48 5.13 4.16 4.66 4.62 5.87"),
    ("resnet32x4", "resnet8x4", "CIFAR-100",
     "1.17 0.43 1.23 1.09 1.46 1.68 1.75 2.02 2.24 1.49 1.07 1.61 2.62"),
    ("resnet32x4", "resnet8x4", "CIFAR-10",
     "2.10 0.93 2.12 2.31 1.74 2.39 2.42 2.61 2.80 1.56 1.77 2.04 3.30"),
    ("resnet32x4", "resnet8x4", "STL-10",
     "1.51 0.26 0.93 1.34 0.22 1.58 1.44 1.69 1.85 0.89 1.22 1.40 2.09"),
    ("resnet32x4", "resnet8x4", "Tiny-ImageNet",
     "0.77 1.31 1.20 1.89 1.87 1.91 0.91 2.19 2.35 0.87 1.26 1.65 2.83"),
    ("resnet32x4", "resnet8x4", "ImageNet-100",
     "3.12 2.32 2.66 3.03 2.75 3.21 3.33 3.62 3.65 2.72 3.17 3.36 3.99"),
    ("resnet32x4", "resnet8x4", "ImageNet",
     "2.76 1.90 2.23 2.20 2.37 3.05 3.24 3.17 3.53 3.09 2.94 2.39 4.02"),
    ("resnet32x4", "crd_shufflenet_v1", "CML",
     "6.14 5.85 6.58 6.85 6.34 7.62 7.25 6.85 7.58 6.15 6.40 5.72 7.71"),
    ("resnet32x4", "crd_shufflenet_v1", "CIFAR-100",
     "1.17 0.52 1.28 0.76 0.45 1.48 1.42 1.50 1.66 0.84 0.95 1.37 2.35"),
    ("resnet32x4", "crd_shufflenet_v1", "CIFAR-10",
     "3.61 3.31 3.68 4.08 3.97 4.31 5.14 4.44 4.22 4.34 3.97 3.66 5.43"),
    ("resnet32x4", "crd_shufflenet_v1", "STL-10",
     "5.04 4.14 4.71 4.73 5.07 4.61 4.13 5.01 5.42 5.18 4.25 3.61 5.78"),
    ("resnet32x4", "crd_shufflenet_v1", "Tiny-ImageNet",
     "3.92 3.68 3.88 4.78 4.77 5.05 4.78 5.38 5.67 4.38 4.67 3.37 6.03"),
    ("resnet32x4", "crd_shufflenet_v1", "ImageNet-100",
     "4.24 3.57 3.42 3.98 4.17 4.71 4.60 5.03 4.30 4.04 3.93 4.68 5.17"),
    ("resnet32x4", "crd_shufflenet_v1", "ImageNet",
     "4.40 4.63 4.34 4.70 4.36 4.54 5.03 5.10 5.49 5.22 4.77 5.08 5.71"),
    ("resnet32x4", "crd_shufflenet_v2", "CML",
     "5.34 5.13 4.03 5.36 5.49 6.03 6.22 6.72 6.80 6.55 5.99 6.35 7.51"),
    ("resnet32x4", "crd_shufflenet_v2", "CIFAR-100",
     "2.51 1.50 2.41 2.50 1.37 2.99 1.30 3.51 4.03 3.14 2.32 3.19 4.20"),
    ("resnet32x4", "crd_shufflenet_v2", "CIFAR-10",
     "2.67 2.46 2.57 2.17 3.01 2.80 2.74 3.17 2.94 3.66 2.91 3.45 4.24"),
    ("resnet32x4", "crd_shufflenet_v2", "STL-10",
     "4.78 3.77 4.64 4.24 4.77 4.96 5.16 5.21 4.70 4.23 4.64 4.31 5.67"),
    ("resnet32x4", "crd_shufflenet_v2", "Tiny-ImageNet",
     "2.94 2.50 3.46 2.76 3.50 4.80 5.51 3.75 4.73 4.10 4.48 3.40 6.27"),
    ("resnet32x4", "crd_shufflenet_v2", "ImageNet-100",
     "3.55 3.34 3.20 3.26 3.48 3.58 3.84 3.96 4.11 3.42 3.74 3.59 4.42"),
    ("resnet32x4", "crd_shufflenet_v2", "ImageNet",
     "4.76 4.70 4.92 4.87 4.67 4.92 5.62 5.51 5.74 5.50 5.11 5.24 5.87"),
    ("crd_vgg13", "crd_vgg8", "CML",
     "2.88 2.12 2.48 2.45 1.48 3.48 3.78 3.14 3.57 2.97 1.78 2.94 4.00"),
    ("crd_vgg13", "crd_mobilenet_v2", "CML",
     "2.34 2.07 0.67 1.91 2.24 3.07 2.94 3.19 3.34 2.85 2.01 2.40 4.06"),
]  # fmt: skip
# Table 7's, over the first part alone.
SUMS = (
    *("kd+ds", "fitnets+kd", "fitnets+ds", "at+kd", "at+ds", "nst+kd", "nst+ds"),
    *("crd+kd", "crd+ds", "rkd+kd", "rkd+ds"),
)
SUM_GAINS = {
    "resnet8x4": "2.03 0.48 2.04 0.49 2.36 0.22 1.19 0.14 0.76 0.33 2.01",
    "crd_shufflenet_v1": "2.39 0.21 1.42 0.46 1.01 0.21 0.62 0.04 1.03 0.17 1.88",
}


@pytest.mark.parametrize(("teacher", "student", "name", "gains"), GAINS)
def test_accuracies_give_the_printed_gains(
    teacher: str, student: str, name: str, gains: str
) -> None:
    printed = published.columns(teacher, student)[name]
    found = [printed[method] - printed["alone"] for method in ORDER]
    # Three cells of Table 5 are a hundredth off: they were rounded apart from the accuracies.
    assert found == pytest.approx([float(gain) for gain in gains.split()], abs=0.0101)
    off = sum(abs(a - float(b)) > 0.005 for a, b in zip(found, gains.split(), strict=True))
    assert off == (3 if (student, name) == ("crd_shufflenet_v1", "ImageNet-100") else 0)


@pytest.mark.parametrize("student", SUM_GAINS)
def test_sums_give_the_printed_gains(student: str) -> None:
    printed = published.columns("resnet32x4", student)["CML"]
    found = [printed[name] - printed[name.split("+")[0]] for name in SUMS]
    expected = [float(gain) for gain in SUM_GAINS[student].split()]
    assert found == pytest.approx(expected, abs=0.0051)


def test_every_cell_of_tables_2_to_5_is_there() -> None:
    cells = {
        (*pair, name): len(column)
        for pair in published.PAIRS
        for name, column in published.columns(*pair).items()
    }
    assert len(cells) == len(GAINS) == 23
    assert set(cells) == {row[:3] for row in GAINS}
    assert set(cells.values()) == {15, 26}  # 15 rows; with Table 7's sums 26


def test_the_ablation_starts_from_the_whole() -> None:
    found = published.ABLATION
    assert list(found) == ["all", "SRM", "SEM-1", "SEM-2", "DCM-1", "DCM-2"]
    assert (
        found["all"] == published.columns(*published.NETWORKS)["CML"]["ds"] == max(found.values())
    )
    # As the text says: SRM has the largest effect, SEM-1 the second largest.
    assert sorted(found, key=found.__getitem__)[:2] == ["SRM", "SEM-1"]


def test_all_published_networks_and_data_sets_can_be_trained() -> None:
    for name in {name for pair in published.PAIRS for name in pair}:
        assert timm.is_model(name)
    for name in ("cml", "cifar100", "cifar10", "stl10", "tiny_imagenet", "imagenet100", "imagenet"):
        entry = recipe(name, Options)
        title, column = published.column(name, entry.teacher, entry.student) or ("", {})
        assert column["ds"] == published.columns(*published.NETWORKS)[title]["ds"]


def test_what_the_paper_has_not_got() -> None:
    assert published.column("mnist", "resnet32x4", "resnet8x4") is None
    assert published.column("cifar10", "crd_vgg13", "crd_vgg8") is None
    assert published.column("cml", "crd_vgg13", "crd_vgg8") is not None
    assert published.columns("resnet8", "resnet8") == {}


# What was compared with the text: rows (without our second form), columns, and a checksum.
COMPARED = {
    "table2": (15, 5, "cc782e1271822f2e"),
    "table3": (15, 6, "d14d6274961c97d8"),
    "table4": (15, 6, "699b3bc7f45a7ef1"),
    "table5": (15, 6, "bf0c2f92269c2474"),
    "table6": (6, 1, "77b1705cba8da561"),
    "table7": (18, 2, "282ae71b7e82d723"),
}
# Their text cannot be in the repository.
PAPERS = os.environ.get("STRUCTKD_PAPERS")
TITLES = {"baseline-t": "teacher", "baseline-s": "alone", "ours": published.OURS}
Cells = list[tuple[str, list[float]]]  # a table's rows: our name, and a number a column


def transcribed(name: str) -> Cells:
    table = published.tables()[name]
    rows = [row for row in table.columns[0].accuracies if published.PRINTED not in row]
    if name == "table6":
        rows = [row for row in rows if not row.startswith("printed-")]
    return [(row, [column.accuracies[row] for column in table.columns]) for row in rows]


@pytest.mark.parametrize("name", COMPARED)
def test_no_number_was_changed_since_it_was_compared(name: str) -> None:
    cells = transcribed(name)
    digest = hashlib.sha256(repr(cells).encode()).hexdigest()[:16]
    assert (len(cells), len(cells[0][1]), digest) == COMPARED[name]


def printed_rows(text: str) -> Iterator[tuple[str, list[float]]]:
    """Every line of tables as our names and their numbers, gains left out.

    Its cells are parted by tabs; some have the names or the numbers of several rows, and all are
    strewn with the signs of LaTeX and HTML.
    """
    for line in text.splitlines():
        first, *cells = re.sub(r"<.*?>|\\mathbf|[\\{}$]", "", line).split("\t")
        numbers = [re.findall(r"\b\d\d\.\d\d\b", cell) for cell in cells]
        columns = [[float(number) for number in column] for column in numbers if column]
        names = ["+".join(TITLES.get(n, n) for n in part.lower().split("+"))
                 for part in first.split()]  # fmt: skip
        if columns and all(len(column) == len(names) for column in columns):
            yield from zip(names, map(list, zip(*columns, strict=True)), strict=True)


@pytest.mark.skipif(PAPERS is None, reason="STRUCTKD_PAPERS names no folder with the papers' text")
def test_every_number_is_the_one_in_the_text() -> None:
    text = (Path(PAPERS or "") / "dskd.md").read_text()
    rows = list(printed_rows(text))
    for name in ("table2", "table3", "table4", "table5", "table7"):
        expected = transcribed(name)
        assert rows[: len(expected)] == expected, name
        del rows[: len(expected)]
    assert not rows
    # Of Table 6 the text has no lines: four numbers beside marks, and two alone.
    (marked,) = re.findall(r"^SRM SEM-1 .*", text, re.MULTILINE)
    left = re.findall(r"\d\d\.\d\d", marked) + re.findall(r"^\d\d\.\d\d$", text, re.MULTILINE)
    assert [float(number) for number in left] == [row[0] for _, row in transcribed("table6")]


DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_of_both_papers_has_the_numbers_of_the_raw_runs() -> None:
    runs = json.loads((DOCS / "results" / "cifar10-10k.json").read_text())["runs"]
    ours: dict[str, list[float]] = {}
    for run in runs:
        ours.setdefault(run["method"], []).append(run["accuracy"])
    printed = published.columns(*published.NETWORKS)
    _, text = (DOCS / "papers.md").read_text().split("<!-- table3:begin -->")
    lines = [line.strip("| ").split(" | ") for line in text.split("<!--")[0].strip().splitlines()]
    assert len(lines) == 2 + 10
    for told, *numbers in lines[2:]:
        name = told.split()[0]
        column = printed["CML" if "CML" in told else "CIFAR-10"]
        theirs = column[name] - column["alone"]
        gain = fmean(ours[name]) - fmean(ours["alone"])
        assert numbers == [f"{value:+.2f}" for value in (theirs, gain, gain - theirs)]
