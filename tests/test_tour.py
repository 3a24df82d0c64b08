"""The notebook of the docs, run from its first cell to its last."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

TOUR = Path(__file__).parent.parent / "docs" / "tour.ipynb"


@pytest.mark.usefixtures("digits_are_parsed_once")
def test_the_tour_runs_and_both_students_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "Agg")
    names: dict = {}
    with torch.random.fork_rng():
        for number, cell in enumerate(json.loads(TOUR.read_text())["cells"]):
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), f"tour.ipynb, cell {number}", "exec"), names)
    names["plt"].close("all")
    digits = [names["accuracy"](names[who], names["noisy"]) for who in ("alone", "student")]
    assert digits[1] > digits[0] + 0.1
    water = [
        names["overlap"](names[who], names["radar_test"]) for who in ("map_alone", "map_student")
    ]
    assert water[1] > water[0]
