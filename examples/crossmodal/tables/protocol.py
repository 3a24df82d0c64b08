"""How far a job's settings are from the published ones, in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from crossmodal.data import Views
from crossmodal.data.poverty import Noise
from crossmodal.recipes import Recipe
from crossmodal.runs.job import Job
from crossmodal.tables import published

ROLES = ("teacher", "student")
# Seeds are counted in the table; neither the memory's format nor a share of labels that is not
# asked for changes what is learned.
_LEFT_OUT = ("seed", "channels_last", "labelled")
_STUDENTS = ("falling", "fresh_noise")


def differences(
    job: Job, recipes: Mapping[str, Recipe], views: Views, column: published.Column
) -> list[str]:
    """A line for each setting that is not the paper's, or of which it says nothing.

    Args:
        job: What was asked for.
        recipes: The job's, their precision settled.
        views: The job's images.
        column: The published column that the job is compared with.
    """
    return [*_networks(job, column), *_images(job, views), *_trainings(job, recipes)]


def _networks(job: Job, column: published.Column) -> Iterable[str]:
    for role in ROLES:
        wanted = getattr(column, role)
        if job.models[role] != wanted:
            yield f"{role} `{job.models[role]}`, published `{wanted}`"


def _images(job: Job, views: Views) -> Iterable[str]:
    wanted, noise = job.wanted, published.noise(job.entry.name)
    if wanted.evaluate == "val":
        yield "accuracy on a tenth of the training images, which are held out, not on the test set"
    if wanted.limit is not None:
        yield f"{wanted.limit} training images only"
    if wanted.labels is not None:
        yield f"{wanted.labels} training images have labels, published all"
    if noise is not None and views.poverty != str(Noise(noise)):
        yield f"poor images are {views.poverty}, published {Noise(noise)}"
    for name, value in wanted.options.items():
        own = job.entry.options[name]
        if own not in ("", value):  # nobody can do without what the recipe leaves empty
            yield f"`{name}` {value}; the recipe has {own}"


def _trainings(job: Job, recipes: Mapping[str, Recipe]) -> Iterable[str]:
    stated, unmentioned = published.protocol(), published.unmentioned()
    own = {role: job.entry.recipe(role, {}, {}) for role in ROLES}
    for name in (field.name for field in fields(Recipe) if field.name not in _LEFT_OUT):
        roles = ("student",) if name in _STUDENTS else ROLES
        known = stated | unmentioned
        wanted = {role: known.get(name, getattr(own[role], name)) for role in roles}
        found = {role: getattr(recipes[role], name) for role in roles}
        off = {role: value for role, value in found.items() if value != wanted[role]}
        if not off:
            continue
        if len(off) == len(ROLES) and len(set(off.values())) == 1:
            shown = _text(next(iter(off.values())))
        else:
            shown = " and ".join(f"{_text(value)} ({role})" for role, value in off.items())
        if name in stated:
            told = f", published {_text(stated[name])}"
        elif name in unmentioned:
            told = ", of which the paper says nothing"
        else:
            others = " and ".join(dict.fromkeys(_text(wanted[role]) for role in off))
            told = f"; the recipe has {others}, the paper says nothing of it"
        yield f"`{name}` {shown}{told}"


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)
