"""What the command line says of a recipe."""

from __future__ import annotations

import pytest

from crossmodal import cli
from crossmodal.recipes import Recipe


def test_the_help_says_what_every_field_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        cli.parse(["--help"])
    said = capsys.readouterr().out
    told = Recipe.told()
    assert told.pop("seed")  # the students' are --seeds
    for name, text in told.items():
        assert f"--{name.replace('_', '-')}" in said
        assert f"{text} (" in said


@pytest.mark.parametrize(("kind", "count"), [("train", 3), ("sweep", 2)])
def test_a_command_has_the_seeds_that_its_help_names(
    kind: str, count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.parse(["--help"], kind=kind)
    assert f"(default: {count})" in capsys.readouterr().out
    assert cli.parse(["mnist"], kind=kind).seeds == tuple(range(count))
