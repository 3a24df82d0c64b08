"""A recipe and the command line as one set of options.

A recipe is a YAML file with a script's options by name; options on the command line override it.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro
import yaml

_RECIPES = Path(__file__).resolve().parent / "recipes"
_Kind = TypeVar("_Kind")


def parsed(
    arguments: Sequence[str], kind: type[_Kind], default: str = "", program: str = ""
) -> _Kind:
    """``RECIPE --option ...``: a recipe's options, overridden by those that are typed.

    A script with a ``default`` recipe needs none on the command line.
    """
    given = list(arguments)
    program = program or Path(sys.argv[0]).name
    asked = given[:1] in (["-h"], ["--help"])
    head = f"RECIPE comes first: a YAML file of your own, or one of {', '.join(_known(kind))}"
    if not given or given[0].startswith("-"):
        if not default and not asked:
            raise ValueError(head)
        if asked:
            print(head + (f"; {default} where none is given.\n" if default else ".\n"))
            tyro.cli(kind, args=["--help"], prog=f"{program} RECIPE")
        given.insert(0, default)
    made = recipe(given[0], kind)
    return tyro.cli(kind, args=given[1:], default=made, prog=f"{program} {given[0]}")


def recipe(name: str, kind: type[_Kind], **changes: Any) -> _Kind:
    """The options of a recipe: a name of ``recipes/``, or a YAML file; ``like`` begins with one.

    Raises:
        ValueError: There is no such recipe, it cannot be read, or it has an unknown option.
    """
    own = name.endswith((".yaml", ".yml"))
    file = Path(name).expanduser() if own else _RECIPES / f"{name}.yaml"
    if not file.exists():
        known = _known(kind)
        raise ValueError(f"unknown recipe {name!r}; {near(name, known)}known: {', '.join(known)}")
    values: dict[str, Any] = {"recipe": file.stem}
    seen: list[Path] = []
    while file:
        seen.append(file)
        content = _read(file)
        like = content.pop("like", None)
        values = {**content, **values}
        places = [room / f"{like}.yaml" for room in (file.parent, _RECIPES)] if like else []
        file = next((place for place in places if place.exists() and place not in seen), None)
        if like and file is None:
            raise ValueError(
                f"recipe {seen[-1]} is like {like!r}, which is none, or is like this one; fix: the "
                f"name of a recipe beside it, or one of {', '.join(_known(kind))}"
            )
    adapted = getattr(kind, "adapted", dict)
    values = adapted(values) | changes
    types, kinds = {one.name: one for one in dataclasses.fields(kind)}, get_type_hints(kind)
    for option, value in values.items():
        if option not in types and not own:
            raise ValueError(
                f"recipe {name} is for another script, as its option {option!r} tells; known here: "
                f"{', '.join(_known(kind))}"
            )
        if option not in types:
            raise ValueError(
                f"recipe {name} has an unknown option {option!r}; "
                f"{near(option, types)}known: {', '.join(types)}"
            )
        values[option] = _typed(
            value, kinds[option], types[option].default, f"recipe {name}: {option}"
        )
    return kind(**values)


def _read(file: Path) -> dict[str, Any]:
    try:
        return dict(yaml.safe_load(file.read_text()) or {})
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        told = str(error).strip().partition("\n")[0]
        raise ValueError(f"recipe {file} cannot be read: {told}") from error


def _typed(value: Any, kind: Any, default: Any, told: str) -> Any:
    """A value of YAML in the option's type: specs become text again, as they are typed."""
    inner = get_args(kind)
    if get_origin(kind) is tuple:
        values = value if isinstance(value, list | tuple) else [value]
        if inner[-1] is not ... and len(values) != len(inner):
            raise ValueError(f"{told} must be {len(inner)} values like {default!r}, got {value!r}")
        return tuple(_typed(_as_text(v) if inner[0] is str else v, inner[0], default, told)
                     for v in values)  # fmt: skip
    if get_origin(kind) is Literal:
        if value not in inner:
            raise ValueError(f"{told} must be one of {', '.join(inner)}, got {value!r}")
        return value
    if type(None) in inner:
        return None if value is None else _typed(value, inner[0], default, told)
    if kind is float:
        try:
            return float(value)  # YAML reads 1e-3 as a text
        except (TypeError, ValueError) as error:
            raise ValueError(f"{told} must be a number like {default!r}, got {value!r}") from error
    if kind is Path and isinstance(value, str | Path):
        return Path(value).expanduser()
    if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
        like = f"like {default!r}" if default else f"of type {kind.__name__}"
        raise ValueError(f"{told} must be {like}, got {value!r}")
    return value


def _as_text(spec: Any) -> Any:
    if not isinstance(spec, list | dict):
        return str(spec) if type(spec) in (int, float) else spec
    return str(yaml.safe_dump(spec, default_flow_style=True, sort_keys=False, width=1000)).strip()


def _known(kind: type) -> list[str]:
    """Recipes of which a script has every option."""
    names = {one.name for one in dataclasses.fields(kind)} | {"like"}
    return sorted(file.stem for file in _RECIPES.glob("*.yaml") if set(_read(file)) <= names)


def near(name: str, known: Iterable[str]) -> str:
    """A hint of near names; empty if there are none."""
    found = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {found[0]!r}? " if found else ""
