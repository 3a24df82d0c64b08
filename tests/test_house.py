"""The house: who may import whom, without a circle and without an arrow back."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import structkd

ROOT = Path(structkd.__file__).parent
# Rooms from the ground up; each may import those below it, and itself.
ROOMS = [
    ["_checks", "_devices", "_modes"],
    ["distributed"],
    ["features"],
    ["projectors", "transport", "capture"],
    ["criteria"],
    ["views", "gallery", "distiller"],
    ["matching", "diagnostics"],
    ["integrations"],
]
# The Distiller knows of no matching, a criterion of no Distiller.
FORBIDDEN = {("distiller", "matching"), ("distiller", "gallery"), ("criteria", "distiller")}
OPTIONAL = {"timm", "mmengine", "mmpretrain", "mmcv"}


def _modules() -> dict[str, Path]:
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        found[".".join(("structkd", *parts))] = path
    return found


MODULES = _modules()


def _imports(name: str) -> set[str]:
    """Returns all modules that a file imports anywhere in it, in functions and for types too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            module = node.module or ""
            for alias in node.names:
                whole = f"{module}.{alias.name}"
                found.add(whole if whole in MODULES else module)
    return found


GRAPH = {name: _imports(name) for name in MODULES if name != "structkd"}


def _room(module: str) -> str:
    return module.split(".")[1]


def test_nothing_inside_imports_the_package_itself() -> None:
    assert [name for name, imported in GRAPH.items() if "structkd" in imported] == []


def test_there_is_no_circle() -> None:
    order = TopologicalSorter(
        {name: {other for other in imported if other in GRAPH and other != name}
         for name, imported in GRAPH.items()}
    )  # fmt: skip
    assert len(list(order.static_order())) == len(GRAPH)


def test_no_arrow_goes_back() -> None:
    floor = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
    assert {_room(name) for name in GRAPH} == set(floor)
    for name, imported in GRAPH.items():
        for other in imported & GRAPH.keys():
            here, there = _room(name), _room(other)
            assert floor[there] <= floor[here], f"{name} imports {other}, which is above it"
            assert floor[there] < floor[here] or here == there or here in ("matching",), (
                f"{name} imports {other} of the same floor"
            )
            assert (here, there) not in FORBIDDEN, f"{name} imports {other}"


def test_only_the_integrations_know_other_peoples_frameworks() -> None:
    for name, imported in GRAPH.items():
        if _room(name) != "integrations":
            assert not {part.split(".")[0] for part in imported} & OPTIONAL, name


def test_diagnostics_read_public_names_only() -> None:
    for name in GRAPH:
        if _room(name) != "diagnostics":
            continue
        for node in ast.walk(ast.parse(MODULES[name].read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("structkd."):
                room = (node.module or "").split(".")[1]
                private = [alias.name for alias in node.names if alias.name.startswith("_")]
                assert not private, f"{name} imports {private}"
                if room not in ("_checks", "_modes", "_devices", "diagnostics"):
                    assert "._" not in (node.module or ""), f"{name} imports {node.module}"
