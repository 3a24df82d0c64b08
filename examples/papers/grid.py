"""Several jobs of one command: all are opened, and their time is told, before the first is trained.

With ``--jobs`` the processes that help are given the command again; each works on the students of
the one job that is under way.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import tyro

from store import HELPER
from train import Session

PART = "STRUCTKD_PART"  # names the job that helping processes are for
_DAY = 24 * 3600


def split(kind: type[Any], arguments: Sequence[str], prog: str) -> tuple[Any, list[str]]:
    """A subcommand's own options, and those of ``train.py`` that stand among them."""
    told = f"{kind.__doc__}\n\nAnd every option of train.py or unpaired.py: see their --help."
    return tyro.cli(
        kind, args=list(arguments), prog=prog, description=told, return_unknown_args=True
    )


def opened(
    makers: Mapping[str, Callable[[], Session]], lacking: dict[str, str] | None = None
) -> dict[str, Session]:
    """Every job, looked at; ``lacking``, where given, takes the errors of those that cannot be.

    Raises:
        ValueError: All together take more than a day, and ``--yes`` is not among their options.
    """
    helper, yes, total = HELPER in os.environ, False, 0.0
    found: dict[str, Session] = {}
    teachers: set[Path] = set()
    for name, make in makers.items():
        if helper and name != os.environ.get(PART):
            continue
        try:
            session = make()
            yes = session.options.yes
            session.options = replace(session.options, yes=True)  # asked for all at once, below
            if not helper:
                total += _ahead(session, teachers)
        except (ValueError, FloatingPointError) as error:
            if lacking is None:
                raise
            lacking[name] = str(error)
        else:
            found[name] = session
    told = f"{len(found)} jobs together: at most about {timedelta(seconds=round(total))}"
    if total and len(found) > 1:
        next(iter(found.values())).show.say(told)
    if total > _DAY and not yes:
        raise ValueError(f"{told}, more than a day; fix: --yes, fewer --epochs, or a GPU")
    return found


def _ahead(session: Session, teachers: set[Path]) -> float:
    """The seconds that a job takes; a teacher that several jobs share is counted once."""
    missing = session.missing()
    if not missing:
        return 0.0
    seconds, teacher = session.preflight(missing), session.teacher_checkpoint().path
    if teacher in teachers and not teacher.exists():
        seconds -= session.estimated(session.teacher_training())
    teachers.add(teacher)
    return seconds


def each(sessions: dict[str, Session]) -> Iterator[tuple[str, Session]]:
    """One job after another; the images of those that are over are let go."""
    for name in list(sessions):
        os.environ[PART] = name
        session = sessions.pop(name)
        if not session.helper:
            session.show.say(f"\n{name}")
        yield name, session
