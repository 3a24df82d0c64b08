"""The command lines of ``train.py``, ``compare.py`` and ``sweep.py``: options in, a job out."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from crossmodal.data import Wanted
from crossmodal.data.options import add_options, options
from crossmodal.methods import ALONE, METHODS, SWEEPS, resolve
from crossmodal.methods.variants import PAIRS, VARIANTS, Variant, Weights, plan, variant
from crossmodal.near import did_you_mean
from crossmodal.recipes import ROLES, DataSet, Recipe, data_sets
from crossmodal.runs.job import Asked, Job
from crossmodal.training.matching import BYS, Rematching
from structkd import RematchSchedule

TRAINED = (ALONE, "kd", "ds")  # train.py's methods, where none are named
# The paper's rows, then those that it does not have.
COMPARED = (*(name for name in METHODS if name != "ska"), "kd+ds")
# Where an error raised on purpose comes from; one from elsewhere keeps its traceback.
_OURS = ("crossmodal", "structkd")
_LONE = Variant(ALONE, "none")


def main(arguments: Sequence[str] | None = None, *, kind: str = "train") -> int:
    """Run a script; 0, 1 where a method failed, 2 after one line on stderr, 130 for Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    code = 0

    def action() -> None:
        nonlocal code
        code = _run(parse(given, kind=kind), kind)

    return reported(action) or code


def reported(action: Callable[[], object]) -> int:
    """Run an action; returns 0, or 2 after one line for an error raised on purpose."""
    try:
        action()
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last epoch", file=sys.stderr)
        return 130
    except OSError as error:
        print(
            f"error: {error}; what is finished is kept, the same command goes on", file=sys.stderr
        )
        return 2
    except (ValueError, TypeError, FloatingPointError) as error:
        if not _on_purpose(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(job: Job, kind: str) -> int:
    from crossmodal.runs.session import Session
    from crossmodal.tables.write import write

    console = Console()
    session = Session(job, console)
    runs = session.run()
    if session.leads and not session.helper:
        write(session, runs, kind)
    return int(any("failed" in run for run in runs))


def parse(arguments: Sequence[str], *, kind: str = "train") -> Job:
    """Turn command-line arguments into a job; the data set's recipe fills what is not given."""
    wanted = _parser(kind).parse_args(arguments)
    known = data_sets(wanted.recipes)
    if wanted.dataset not in known:
        paired, others = ([n for n, e in known.items() if e.matched == m] for m in (False, True))
        raise ValueError(
            f"unknown data set {wanted.dataset!r}; {did_you_mean(wanted.dataset, known)}known: "
            f"{', '.join(paired)}; without pairs: {', '.join(others)}"
        )
    entry = known[wanted.dataset]
    if wanted.jobs < 1 or (wanted.jobs > 1 and wanted.fresh):
        raise ValueError(f"--jobs must be at least 1, and 1 with --fresh, got {wanted.jobs}")
    poor, own = options(wanted, entry)
    recipes = {role: entry.recipe(role, *_given(wanted, role)) for role in ROLES}
    student = recipes["student"]
    if kind == "sweep":
        wanted.evaluate = "val"
    folder = f"sweep-{entry.name}" if kind == "sweep" else entry.name
    return Job(
        entry=entry,
        wanted=Wanted(
            data_dir=wanted.data,
            download=wanted.download,
            limit=wanted.limit,
            labels=wanted.labels,
            evaluate=wanted.evaluate,
            poor=poor,
            amount=wanted.amount,
            rgb=None if wanted.rgb_bands is None else tuple(wanted.rgb_bands),
            options=own,
        ),
        asked=_asked(wanted, entry, kind),
        seeds=_seeds(wanted.seeds or ("2" if kind == "sweep" else "3")),
        models={
            "teacher": wanted.teacher or entry.teacher,
            "student": wanted.student or entry.student,
            "matcher": wanted.matcher or entry.matcher or entry.teacher,
        },
        recipes=recipes,
        rematching=Rematching.scaled(
            RematchSchedule(**entry.rematch), student.epochs, wanted.rematch_by
        ),
        out=wanted.out or Path("runs") / folder,
        device=wanted.device,
        memory=wanted.memory,
        workers=wanted.workers,
        jobs=wanted.jobs,
        compiled=wanted.compile,
        board=wanted.tensorboard,
        fresh=wanted.fresh,
        resume=wanted.resume,
        command=shlex.join(["python", f"examples/{kind}.py", *arguments]),
    )


def _asked(wanted: argparse.Namespace, entry: DataSet, kind: str) -> tuple[Asked, ...]:
    if kind == "sweep":
        groups = wanted.group or list(SWEEPS)
        for name in groups:
            if name not in SWEEPS:
                hint = did_you_mean(name, SWEEPS)
                raise ValueError(f"unknown group {name!r}; {hint}known: {', '.join(SWEEPS)}")
        found = [(label, resolve(text)) for name in groups for label, text in SWEEPS[name].items()]
    elif entry.matched:
        if wanted.method is not None:
            raise ValueError(f"--method is for pairs; {entry.name} has --variant and --criterion")
        # Only images that were made poor have rich originals to pair them with.
        known = [name for name in VARIANTS if entry.unpaired or name != "paired"]
        names = known if wanted.variant is None else _names("--variant", wanted.variant, known)
        weights = Weights(*wanted.weights)
        rows = {}
        for name in names:
            which = variant(name)
            made = plan(which, wanted.criterion, weights)
            rows[made.name] = Asked(made.name, made, which)
        return tuple(rows.values())
    else:
        texts = wanted.method or list(COMPARED if kind == "compare" else TRAINED)
        plans = [resolve(name) for name in _names("--method", texts, METHODS)]
        found = [(made.name, made) for made in plans]
    return tuple(
        Asked(label, made, PAIRS if made.parts else _LONE) for label, made in dict(found).items()
    )


def _given(wanted: argparse.Namespace, role: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The recipe's fields on the command line: for all roles, and for this one."""
    both = []
    for prefix in ("", f"{role}_"):
        values = {f.name: getattr(wanted, f"recipe_{prefix}{f.name}") for f in fields(Recipe)}
        both.append({name: value for name, value in values.items() if value is not None})
    return both[0], both[1]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, with the near name of an option that is not known."""
        words = message.rpartition("unrecognized arguments: ")[2].split()
        hint = ""
        if words and words[0].startswith("--"):
            known = [option for action in self._actions for option in action.option_strings]
            hint = did_you_mean(words[0].partition("=")[0], known)
        raise ValueError(f"{message}; {hint}--help lists all".rstrip())


def _parser(kind: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=f"{kind}.py",
        allow_abbrev=False,
        description=_TEXTS[kind],
        epilog="What is not given comes from the data set's recipe. Finished runs are kept and "
        "skipped when the same command runs again; one that was cut off goes on from its last "
        "epoch.",
    )
    add = parser.add_argument
    add("dataset", metavar="DATASET", help=f"one of {', '.join(data_sets())}, or of --recipes")
    if kind == "sweep":
        add("--group", nargs="+", metavar="NAME", help="part of the candidates (default: all)")
    add(
        *("--method", "--methods"), nargs="+", metavar="NAME", dest="method",
        help="alone, kd, ds, ... (methods.toml), sums such as kd+ds, options such as "
        "ds:terms=[SEM-1,SEM-2] or kd:temperature=2,weight=0.5",
    )  # fmt: skip
    data = parser.add_argument_group("data")
    add_options(data)
    add = data.add_argument
    add("--limit", type=int, metavar="N", help="N training images only, all classes in proportion")
    add("--labels", type=int, metavar="N", help="only N training images have labels; the rest of "
        "the pairs is distilled all the same")  # fmt: skip
    add("--rgb-bands", nargs=3, type=int, metavar=("R", "G", "B"), help="positions from 0")
    add("--evaluate", choices=("test", "val"), default="test",
        help="val holds a tenth of train out, for choosing settings (default: test)")  # fmt: skip
    add("--memory", type=float, default=4.0, metavar="GB", help="more images are streamed (4)")
    add("--workers", type=int, default=2, metavar="N", help="that read streamed images (2)")
    networks = parser.add_argument_group("networks and seeds")
    add = networks.add_argument
    for role in ROLES:
        add(f"--{role}", metavar="NAME", help="a timm model, or one of ours such as resnet32x4")
    add("--seeds", metavar="N|LIST", help="how many, or which as 0,1,2 (default: 3)")
    matched = parser.add_argument_group("without pairs")
    add = matched.add_argument
    weights = Weights()
    add("--variant", "--variants", nargs="+", metavar="NAME", help=", ".join(VARIANTS))
    add("--criterion", default="kd", metavar="NAME", help="any method (default: kd)")
    add("--weights", nargs=3, type=float, metavar=("TASK", "KD", "SKA"),
        default=[weights.task, weights.kd, weights.ska],
        help="of the student's loss (default: 0.3 0.4 0.003, as published)")  # fmt: skip
    add("--rematch-by", choices=BYS, default=BYS[0], help="what DynM goes by: predictions in "
        "training (epoch), or a pass of its own (pass)")  # fmt: skip
    machine = parser.add_argument_group("machine and folder")
    add = machine.add_argument
    add("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    add("--jobs", type=int, default=1, metavar="N", help="train N students side by side")
    add("--compile", action="store_true", help="compile every step")
    add("--tensorboard", action="store_true", help="write TensorBoard files")
    add("--recipes", type=Path, metavar="FILE", help="a TOML file with data sets of your own")
    add("--out", type=Path, metavar="DIR", help="for all that is written (runs/DATASET)")
    add("--fresh", action="store_true", help="train students again that are already finished")
    add("--resume", action="store_true", help="refuse to start where nothing was kept")
    group = parser.add_argument_group(
        "recipe",
        "for teacher and students; --teacher-FIELD, --student-FIELD and --matcher-FIELD for one "
        "(--epochs moves all three, --precision too)",
    )
    for prefix in ("", *(f"{role}_" for role in ROLES)):
        for field in fields(Recipe):
            if field.name != "seed" or prefix:
                _add_field(group, prefix, field.name, field.default)
    parser.set_defaults(recipe_seed=None)
    return parser


def _add_field(group: Any, prefix: str, name: str, default: object) -> None:
    option = "--" + f"{prefix}{name}".replace("_", "-")
    shown: dict[str, Any] = {"dest": f"recipe_{prefix}{name}", "default": None}
    shown["help"] = argparse.SUPPRESS if prefix else f"({default})"
    if isinstance(default, bool):
        group.add_argument(option, action=argparse.BooleanOptionalAction, **shown)
    else:
        group.add_argument(option, type=type(default), metavar=name.upper(), **shown)


def _names(option: str, texts: Sequence[str], known: Mapping[str, Any] | list[str]) -> list[str]:
    """A list of names, by spaces or commas, each once; a name with options keeps its commas."""
    found = [
        name.strip()
        for text in texts
        for name in ([text] if ":" in text else text.split(","))
        if name.strip()
    ]
    if not found:
        raise ValueError(f"{option} names none; known: {', '.join(known)}")
    return list(dict.fromkeys(found))


def _seeds(text: str) -> tuple[int, ...]:
    """``--seeds``: a count, or a list."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    found = tuple(range(numbers[0])) if len(numbers) == 1 else tuple(dict.fromkeys(numbers))
    if not found or min(found) < 0:
        raise ValueError(f"--seeds must be a count such as 3 or a list such as 0,1,2, got {text!r}")
    return found


def _on_purpose(error: BaseException) -> bool:
    trace = error.__traceback__
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    module = str(trace.tb_frame.f_globals.get("__name__", ""))
    return module.split(".")[0] in _OURS


_TEXTS = {
    "train": "Train a teacher on rich images, and students on poor ones by each method.",
    "compare": "Every method on one data set, in the shape of the DSKD paper's Table 2.",
    "sweep": "DSLoss's candidates on a validation split, never on test.",
}
