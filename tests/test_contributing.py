"""CONTRIBUTING.md: its worked example adds a criterion that passes, and its map is the house."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_house import ROOMS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
# A file's name alone on a line, and the block under it.
BLOCKS = re.findall(r"^`([\w/.]+)`\n\n```(\w+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
NEW = [name for name, kind, _ in BLOCKS if kind == "python"]


def _edited(text: str, diff: str) -> str:
    """Puts the lines that begin with + after the lines that stand before them."""
    place = 0
    for line in diff.splitlines(keepends=True):
        if line.startswith("+"):
            text = text[:place] + line[1:] + text[place:]
            place += len(line) - 1
        else:
            place = text.index("\n" + line[1:], max(place - 1, 0)) + len(line)
    return text


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the example touches, with the example in it."""
    copy = tmp_path_factory.mktemp("clone")
    unread = shutil.ignore_patterns("__pycache__")
    for folder in ("structkd", "tests/cases", "tests/reference"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=unread)
    (copy / "examples").mkdir()
    (copy / "tests" / "criteria").mkdir()
    for file in (
        "pyproject.toml",
        "README.md",
        "examples/methods.yaml",
        "tests/__init__.py",
        "tests/devices.py",
        "tests/criteria/test_contract.py",
        "tests/test_house.py",
    ):
        shutil.copy(ROOT / file, copy / file)
    for name, kind, block in BLOCKS:
        text = block if kind == "python" else _edited((copy / name).read_text(), block)
        (copy / name).write_text(text)
    return copy


def _run(tree: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_new_criterion_passes_the_contract_and_configs_find_it(tree: Path) -> None:
    # Compiling is left out for its seconds: every criterion of the library is compiled elsewhere.
    chosen = "(similarity and not compiles) or house or public or configs"
    contract = "tests/criteria/test_contract.py"
    # In the same process: configs find it by its name.
    named = tree / "tests" / "test_named.py"
    named.write_text(
        "from pathlib import Path\n"
        "import structkd, yaml\n"
        "from structkd.criteria import build_criterion\n"
        "def test_configs():\n"
        "    line = yaml.safe_load(Path('examples/methods.yaml').read_text())['sp']\n"
        "    made = build_criterion(line['criterion'])\n"
        "    assert set(made.weights) == {'SimilarityPreservingLoss'} <= set(structkd.__all__)\n"
        "    assert Path(structkd.__file__).is_relative_to(Path.cwd())\n"
    )
    files = (*NEW, "tests/test_house.py", str(named), contract)
    said = _run(tree, "pytest", "-q", *files, "-k", chosen)
    assert int(re.search(r"(\d+) passed", said)[1]) >= 38, said


def test_the_example_is_written_as_we_write(tree: Path) -> None:
    files = [name for name, kind, _ in BLOCKS if Path(name).suffix == ".py"]
    _run(tree, "ruff", "check", *files)
    _run(tree, "ruff", "format", "--check", *files)


def test_an_edit_whose_place_is_gone_is_no_edit() -> None:
    assert _edited("a\nb\nd\n", " b\n+c\n d\n") == "a\nb\nc\nd\n"
    with pytest.raises(ValueError, match="not found"):
        _edited("a\nd\n", " b\n+c\n")


def test_the_map_has_every_room_in_the_order_of_the_floors() -> None:
    table = PAGE.split("| room of `structkd/`")[1].split("\n\n")[0]
    named = [re.findall(r"`(\w+)`", row.split("|")[1]) for row in table.splitlines()[2:]]
    order = [room for row in named for room in row]
    floor = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
    assert sorted(order) == sorted(floor)
    assert [floor[room] for room in order] == sorted(floor.values())
