"""What is published with the code: hints, the README elsewhere, versions, Pythons."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import structkd
from structkd.integrations._extra import NEEDS

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
# What a hint may name beside what the extras install: a codec that few TIFF images need, and rules
# that one command of the papers compares with.
BESIDE = {"imagecodecs", "torchjd"}
_LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")


def _hints() -> list[tuple[str, str]]:
    found = []
    for folder in ("structkd", "examples"):
        for file in (ROOT / folder).rglob("*.py"):
            for said in re.findall(r'pip install ([^"`;,)]*[^"`;,).\s])', file.read_text()):
                found.append((file.name, said))
    return found


def test_every_hint_names_packages_that_an_extra_installs() -> None:
    declared = [
        *PROJECT["project"]["dependencies"],
        *(need for all_ in EXTRAS.values() for need in all_),
    ]
    known = {canonicalize_name(Requirement(need).name) for need in declared} - {"structkd"} | BESIDE
    hints = [hint for hint in _hints() if "{" not in hint[1]]
    assert len(hints) >= 8
    for file, said in hints:
        for package in shlex.split(said):
            assert canonicalize_name(Requirement(package).name) in known, f"{file}: {said}"


@pytest.mark.parametrize("extra", NEEDS)
def test_the_plug_ins_hints_have_the_bounds_of_their_extra(extra: str) -> None:
    hinted, wanted = ({str(Requirement(need)) for need in needs}
                      for needs in (shlex.split(NEEDS[extra]), EXTRAS[extra]))  # fmt: skip
    assert hinted == wanted


def test_the_readme_stands_where_it_is_seen_alone() -> None:
    text = (ROOT / "README.md").read_text()
    links = _LINK.findall(text)
    assert len(links) > 10
    for link in links:
        assert (ROOT / link).exists(), link
    for change in PROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"][
        "substitutions"
    ]:
        text = re.sub(change["pattern"], change["replacement"], text)
    assert _LINK.findall(text) == []
    assert "which criterion for which data (`docs/choosing.md`)" in text


def test_one_version_everywhere() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == structkd.__version__
    heads = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert heads[0] == structkd.__version__


def test_the_pythons_that_are_named_are_those_that_are_tried() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    tried = {*jobs["library"]["strategy"]["matrix"]["python-version"]}
    tried |= {str(step["with"]["python-version"]) for step in jobs["everything"]["steps"]
              if "python-version" in step.get("with", {})}  # fmt: skip
    named = {line.rpartition(" ")[2] for line in PROJECT["project"]["classifiers"]
             if re.search(r":: 3\.\d+$", line)}  # fmt: skip
    assert named == tried
