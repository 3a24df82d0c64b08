"""Options that a job would not read: each is refused with the reason, before any training."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields

from crossmodal.recipes import PREFIX, ROLES, DataSet, Recipe
from crossmodal.runs.job import Asked

# Of the matcher and of matches, beside --variant, --criterion and --weights.
_MATCHED = ("matcher", "rematch_by")


def refuse_unread(
    given: argparse.Namespace,
    entry: DataSet,
    recipes: Mapping[str, Recipe],
    asked: Sequence[Asked],
) -> None:
    """Refuse what has no effect on this data set, or beside the other options.

    Raises:
        ValueError: names the first such option, why nobody reads it and what would.
    """
    for name, reason in (
        *_of_the_job(given, entry),
        *_of_the_recipes(given, entry, recipes, asked),
    ):
        raise ValueError(f"--{name.replace('_', '-')} has no effect here: {reason}")


def _of_the_job(given: argparse.Namespace, entry: DataSet) -> Iterator[tuple[str, str]]:
    if not entry.matched:
        own = [f"recipe_matcher_{field.name}" for field in fields(Recipe)]
        for option in (*_MATCHED, *own):
            if vars(given).get(option) is not None:
                yield (
                    option.removeprefix("recipe_"),
                    f"it is for images without pairs, and {entry.name} has pairs; fix: leave it "
                    f"out, or train {PREFIX}{entry.name}",
                )


def _of_the_recipes(
    given: argparse.Namespace,
    entry: DataSet,
    recipes: Mapping[str, Recipe],
    asked: Sequence[Asked],
) -> Iterator[tuple[str, str]]:
    for name, own, whose in _given(given):
        some = [recipes[role] for role in whose]
        if name == "labelled" and entry.matched:
            yield own, "without pairs every row takes images with a label alone, or whole batches"
        elif name == "labelled" and given.labels is None:
            yield own, "it is for few labels; fix: add --labels N, or leave it out"
        elif name == "pad" and all(recipe.crop != "pad" for recipe in some):
            yield own, "crops are resized; fix: --crop pad, or leave it out"
        elif name == "momentum" and all(recipe.optimizer != "sgd" for recipe in some):
            yield own, f"the optimizer is {some[0].optimizer}; fix: --optimizer sgd"
        elif name == "falling" and not any(row.falls for row in asked):
            yield own, "no row here distils over pairs, true or free; fix: add one, or leave it out"


def _given(given: argparse.Namespace) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Every field of a recipe on the command line: its name, the option, for whom it is."""
    for field in fields(Recipe):
        if f"recipe_{field.name}" in given:
            yield field.name, field.name, ("teacher", "student")
        for role in ROLES:
            if f"recipe_{role}_{field.name}" in given:
                yield field.name, f"{role}_{field.name}", (role,)
