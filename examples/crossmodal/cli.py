"""The command lines of ``train.py``, ``compare.py`` and ``sweep.py``: options in, a job out."""

from __future__ import annotations

import argparse
import shlex
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from itertools import product
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from crossmodal.data import Wanted
from crossmodal.data.options import add_options, options
from crossmodal.methods import ALONE, METHODS, SWEEPS, resolve
from crossmodal.methods.variants import BRIDGE, BRIDGES, PAIRS, VARIANTS, Weights, row
from crossmodal.near import did_you_mean, looked_up
from crossmodal.recipes import ROLES, UNREAD, DataSet, Recipe, data_sets
from crossmodal.runs.job import Asked, Job
from crossmodal.training.matching import BYS, Rematching
from crossmodal.unread import refuse_unread
from structkd import RematchSchedule

TRAINED = (ALONE, "kd", "ds")  # train.py's methods, where none are named
# The paper's rows, then those that it does not have.
COMPARED = (*(name for name in METHODS if name != "ska"), "kd+ds")
# Where an error raised on purpose comes from; one from elsewhere keeps its traceback.
_OURS = ("crossmodal", "structkd")


def main(arguments: Sequence[str] | None = None, *, kind: str = "train") -> int:
    """Run a script; 0, 1 where a method failed, 2 after one line on stderr, 130 for Ctrl-C."""
    given = sys.argv[1:] if arguments is None else arguments
    return reported(lambda: _run(parse(given, kind=kind), kind))


def reported(action: Callable[[], int]) -> int:
    """Run a command; an error raised on purpose becomes one line on stderr and the code 2."""
    try:
        return action()
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last epoch", file=sys.stderr)
        return 130
    except OSError as error:
        told = f"{error}; what is finished is kept, the same command goes on"
    except (ValueError, TypeError, FloatingPointError) as error:
        if not on_purpose(error):
            raise
        told = str(error)
    print(f"error: {told}", file=sys.stderr)
    return 2


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
    given = _parser(kind).parse_args(arguments)
    known = data_sets(given.recipes)
    if given.dataset not in known:
        paired, others = ([n for n, e in known.items() if e.matched == m] for m in (False, True))
        raise ValueError(
            f"unknown data set {given.dataset!r}; {did_you_mean(given.dataset, known)}known: "
            f"{', '.join(paired)}; without pairs: {', '.join(others)}"
        )
    entry = known[given.dataset]
    if given.jobs < 1 or (given.jobs > 1 and given.fresh):
        raise ValueError(f"--jobs must be at least 1, and 1 with --fresh, got {given.jobs}")
    if given.fresh and given.resume:
        raise ValueError(
            "--fresh trains again what is finished, --resume goes on with it; fix: give one of them"
        )
    for option in ("memory", "workers"):
        if not getattr(given, option) >= 0:
            raise ValueError(f"--{option} must be at least 0, got {getattr(given, option)}")
    name = entry.name
    if kind == "sweep":
        name = f"sweep-{entry.name}"
    given.data_dir, (given.poor, given.options) = given.data, options(given, entry)
    common = _given(given)
    recipes = {role: entry.recipe(role, common, _given(given, f"{role}_")) for role in ROLES}
    asked = _asked(given, entry, kind)
    refuse_unread(given, entry, recipes, asked)
    values = {
        "wanted": Wanted(**{f.name: getattr(given, f.name) for f in fields(Wanted)}),
        "asked": asked,
        "seeds": _seeds(given.seeds),
        "models": {
            role: getattr(given, role) or getattr(entry, role) or entry.teacher for role in ROLES
        },
        "recipes": recipes,
        "rematching": Rematching.scaled(
            RematchSchedule(**entry.rematch), recipes["student"].epochs, given.rematch_by or BYS[0]
        ),
        "out": given.out or Path("runs") / name,
        "near": (),
        "command": shlex.join(["python", f"examples/{kind}.py", *arguments]),
    }
    # The other options have their names.
    others = {f.name: getattr(given, f.name, None) for f in fields(Job)}
    return Job(**{**others, "entry": entry, **values})


def _asked(given: argparse.Namespace, entry: DataSet, kind: str) -> tuple[Asked, ...]:
    if entry.matched:
        if kind != "train":
            raise ValueError(
                f"{kind}.py compares methods on pairs, which {entry.name} has not; fix: train.py, "
                "whose --variant names rows without pairs"
            )
        return _variants(given, entry)
    for option in ("variant", "criterion", "weights"):
        if getattr(given, option):
            raise ValueError(f"--{option} is for images without pairs; {entry.name} has --method")
    found = {}
    texts = given.method or ()
    if kind == "sweep":
        groups = names("--group", given.group, SWEEPS) if given.group else ()
        for name in groups or (() if texts else SWEEPS):
            group = looked_up("group", name, SWEEPS)
            found |= {label: resolve(text) for label, text in group.items()}
    else:
        texts = texts or (COMPARED if kind == "compare" else TRAINED)
    plans = [resolve(name) for name in names("--method", texts, METHODS)] if texts else []
    found |= {made.name: made for made in plans}
    return tuple(
        Asked(k, made, PAIRS if made.parts else VARIANTS[ALONE]) for k, made in found.items()
    )


def _variants(given: argparse.Namespace, entry: DataSet) -> tuple[Asked, ...]:
    if given.method is not None:
        raise ValueError(f"--method is for pairs; {entry.name} has --variant and --criterion")
    # Only images that were made poor have rich originals to pair them with.
    known = [name for name in VARIANTS if entry.unpaired or name != "paired"]
    default = [ALONE, *BRIDGES]
    if given.labels is None:
        default += [name for name in known if name != ALONE]
    rows = []
    for name in names("--variant", given.variant or default, [*known, *BRIDGES]):
        weights = Weights(*given.weights)
        variant, made = row(name, given.criterion or "kd", weights)
        if given.labels is not None and variant.matched:
            raise ValueError(
                f"--labels: {name} matches every image by its label, also those that have none; "
                f"rows without matches are {ALONE}, {BRIDGE} and {BRIDGE}+METHOD"
            )
        rows.append(Asked(made.name, made, variant))
    return tuple(rows)


def _given(given: argparse.Namespace, prefix: str = "") -> dict[str, Any]:
    """The recipe's fields on the command line: for all roles, or for one."""
    options = {f"recipe_{prefix}{f.name}": f.name for f in fields(Recipe)}
    return {name: vars(given)[option] for option, name in options.items() if option in given}


def place(text: str) -> Path:
    """A path from the command line; of ``--out=~/runs`` the shell leaves the ``~``."""
    return Path(text).expanduser()


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, with the near name of an option that is not known."""
        words = message.rpartition("unrecognized arguments: ")[2].split()
        hint = ""
        if words and words[0].startswith("--"):
            known = [option for action in self._actions for option in action.option_strings]
            hint = did_you_mean(words[0].partition("=")[0], known)
        raise ValueError(f"{message}; {hint}--help lists all".rstrip())


def _parser(kind: str) -> argparse.ArgumentParser:
    parser = Parser(
        prog=f"{kind}.py",
        allow_abbrev=False,
        description=_TEXTS[kind],
        epilog="The same command again skips what is finished and goes on with what was cut off.",
    )
    add = parser.add_argument
    add("dataset", metavar="DATASET", help=f"one of {', '.join(data_sets())}, or of --recipes")
    if kind == "sweep":
        add("--group", nargs="+", metavar="NAME", help="of the candidates (default: all)")
    told = f"{', '.join(METHODS)}; sums as kd+ds; options as kd:temperature=2,weight=0.5"
    add("--method", "--methods", nargs="+", metavar="NAME", dest="method", help=told)
    data = parser.add_argument_group("data")
    add_options(data)
    add = data.add_argument
    add("--limit", type=int, metavar="N", help="N training images only, all classes in proportion")
    told = "training images that have a label; all pairs are distilled (default: all)"
    add("--labels", type=int, metavar="N", help=told)
    told = "where red, green and blue are among the bands, counted from 0"
    add("--rgb-bands", dest="rgb", nargs=3, type=int, metavar=("R", "G", "B"), help=told)
    # A sweep chooses settings, so it never looks at the test images.
    splits = ("val",) if kind == "sweep" else ("test", "val")
    told = f"val holds a tenth of train out, for choosing settings (default: {splits[0]})"
    add("--evaluate", choices=splits, default=splits[0], help=told)
    told = "where images take more, they are read during the training (4)"
    add("--memory", type=float, default=4.0, metavar="GB", help=told)
    add("--workers", type=int, default=2, metavar="N", help="processes that read such images (2)")
    networks = parser.add_argument_group("networks and seeds")
    add = networks.add_argument
    for role in ROLES:
        add(f"--{role}", metavar="NAME", help="a timm model, or one of ours such as resnet32x4")
    seeds = "2" if kind == "sweep" else "3"
    told = f"how many, or which as 0,1,2 (default: {seeds})"
    add("--seeds", metavar="N|LIST", default=seeds, help=told)
    matched = parser.add_argument_group("without pairs")
    add = matched.add_argument
    told = f"{', '.join(VARIANTS)}, {BRIDGE}, {BRIDGE}+METHOD"
    add("--variant", "--variants", nargs="+", metavar="NAME", help=told)
    add("--criterion", metavar="NAME", help="any method (default: kd)")
    add("--weights", nargs=3, type=float, metavar=("TASK", "KD", "SKA"), default=[],
        help="of the student's loss (default: 0.3 0.4 0.003, as published)")  # fmt: skip
    told = "whose predictions DynM matches by: training's (epoch), or a pass of their own (pass)"
    add("--rematch-by", choices=BYS, help=told)
    machine = parser.add_argument_group("machine and folder")
    add = machine.add_argument
    add("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    add("--jobs", type=int, default=1, metavar="N", help="train N students side by side (1)")
    add("--compile", action="store_true", help="compile every step")
    add("--tensorboard", action="store_true", help="write TensorBoard files")
    add("--recipes", type=place, metavar="FILE", help="a TOML file with data sets of your own")
    told = f"for all that is written (runs/{'sweep-' * (kind == 'sweep')}DATASET)"
    add("--out", type=place, metavar="DIR", help=told)
    told = "train students again that are already finished; not with --jobs or --resume"
    add("--fresh", action="store_true", help=told)
    add("--resume", action="store_true", help="refuse to start where nothing was kept")
    told = (
        "For teacher and students; epochs, crops and precision for the matcher too. "
        "--teacher-FIELD, --student-FIELD and --matcher-FIELD are for one. Where the data set's "
        "recipe says nothing, the value is the one in brackets."
    )
    group, texts = parser.add_argument_group("recipe", told), Recipe.told()
    for prefix, field in product(("", *(f"{role}_" for role in ROLES)), fields(Recipe)):
        name, kind = f"{prefix}{field.name}", type(field.default)
        how: dict[str, Any] = {"default": argparse.SUPPRESS}
        if kind is bool:
            how["action"] = argparse.BooleanOptionalAction
        else:
            how |= {"type": kind, "metavar": field.name.upper()}
        unread = UNREAD.get(prefix.rstrip("_"), ())
        if name != "seed" and field.name not in unread:  # a student's seeds are --seeds
            usual = f"{field.default:.3g}" if kind is float else field.default
            shown = argparse.SUPPRESS if prefix else f"{texts[field.name]} ({usual})"
            option = "--" + name.replace("_", "-")
            group.add_argument(option, dest=f"recipe_{name}", help=shown, **how)
    return parser


def names(option: str, texts: Iterable[str], known: Iterable[str]) -> list[str]:
    """A list of names, by spaces or commas, each once; a name with options keeps its commas."""
    parts = [part for text in texts for part in ([text] if ":" in text else text.split(","))]
    found = dict.fromkeys(part.strip() for part in parts if part.strip())
    if not found:
        raise ValueError(f"{option} names none; known: {', '.join(known)}")
    return list(found)


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


def on_purpose(error: BaseException) -> bool:
    *_, last = traceback.walk_tb(error.__traceback__)
    return str(last[0].f_globals.get("__name__", "")).split(".")[0] in _OURS


_TEXTS = {
    "train": "Train a teacher on rich images, and students on poor ones by each method.",
    "compare": "Every method on one data set, in the shape of the DSKD paper's Table 2.",
    "sweep": "DSLoss's candidates on a validation split, never on test.",
}
