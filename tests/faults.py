"""Does a job survive what happens to it? ``python tests/faults.py``.

Each kind of job runs once to its end on tiny made images. Then the same job is killed at random
moments, started twice at once, given a disk that is full, files whose times jump, and damaged
files, one at a time. The next command must come to the same results and weights, to the bit, and
must not train again what was finished; of a damaged file it says which one it is. A line a trial, a
table at the end, 1 if one failed. ``--only segment``, ``--faults kill`` try some alone.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import torch

import segment
import structkd
import train
import unpaired
from papers import __main__ as papers
from papers.figures import read_history
from store import code_digest, read_checkpoint
from tests.examples import layouts
from tests.examples.entries import damage, outcome, results

FAST = ("--epochs=3", "--teacher-epochs=2", "--batch-size=8", "--device=cpu", "--seeds=0")
JOBS: dict[str, tuple[Callable[[list[str]], int], tuple[str, ...]]] = {
    "train": (train.main, (
        "{recipe}", *FAST, "--criterion", "alone", "[kd, dense, crd]", "--ema", "0.9")),
    "unpaired": (unpaired.main, (
        "{recipe}", *FAST, "--matcher-epochs", "2", "--rows", "pairs made poor + dense",
        "SemBridge as published")),
    "segment": (segment.main, (
        "scenes", "--rich={scenes}/rich", "--poor={scenes}/poor", "--masks={scenes}/masks", *FAST,
        "--crop", "16", "--teacher", "unet8", "--student", "unet8", "--labels", "5", "--criterion",
        "mean teacher", "dense")),
    "papers labels": (papers.main, (
        "labels", "{recipe}", *FAST, "--labels", "12", "all", "--criterion", "alone", "kd")),
}  # fmt: skip
READERS: dict[str, Callable[[Path], Any]] = {".pt": read_checkpoint, ".csv": read_history}
Trial = tuple[str, str]  # what was done; what came out wrong, empty where nothing did
_LONGEST = 900  # seconds; a command that never ends is a failure
_PROBE = 4096  # bytes that a job writes to see whether it can
_TRAINED = re.compile(r"(?:trained in \d+ s|\(\d+ s\))$", re.MULTILINE)  # said once a network


class Ended(NamedTuple):
    code: int
    said: str

    @property
    def crashed(self) -> bool:
        return "Traceback" in self.said

    def lines(self, kind: str) -> list[str]:
        return [line for line in self.said.splitlines() if line.startswith(f"{kind}: ")]

    def names(self, path: Path) -> bool:
        """Whether it was refused in one line that names a file, or one of a folder."""
        errors = self.lines("error")
        return len(errors) == 1 and str(path) in errors[0]


class Command:
    """A command in a process of its own; a fork, as a job is short beside the import of torch."""

    def __init__(self, job: Job, out: Path, *more: str, most: int | None = None) -> None:
        self._pipe, end = os.pipe()
        sys.stdout.flush()
        self._pid = os.fork()
        if self._pid:
            os.close(end)
            return
        code = 70
        try:
            os.dup2(end, 1)
            os.dup2(end, 2)
            torch.manual_seed(os.getpid())  # another process draws from elsewhere
            if most is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
            code = job.main([*job.given, "--out", str(out), *more])
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)

    def ended(self, kill: Callable[[], bool] = lambda: False) -> Ended:
        """Wait for its end, or kill it as soon as it is time."""
        said, last = b"", time.monotonic() + _LONGEST
        while True:
            if kill() or time.monotonic() > last:
                os.kill(self._pid, signal.SIGKILL)
            if select.select([self._pipe], [], [], 0.005)[0]:
                some = os.read(self._pipe, 1 << 16)
                said += some
                if not some:
                    break
        os.close(self._pipe)
        status = os.waitpid(self._pid, 0)[1]
        return Ended(os.waitstatus_to_exitcode(status), said.decode())


class Job:
    """One kind of job: its command, and what it leaves when nothing happens to it."""

    def __init__(self, name: str, room: Path, places: dict[str, Path], seed: int) -> None:
        self.main, given = JOBS[name]
        self.given = [text.format(**places) for text in given]
        self.data = [*places["recipe"].parent.rglob("*.*")]
        self.room, self.draws, self._count = room, random.Random(seed), 0
        self.out, started = room / "whole", time.monotonic()
        ended = Command(self, self.out).ended()
        self.seconds = time.monotonic() - started
        if ended.code:
            raise SystemExit(f"{name}: fails as it is; fix that first\n{ended.said}")
        self.whole, self.trainings = outcome(self.out), len(_TRAINED.findall(ended.said))

    @cached_property
    def cut(self) -> Path:
        """The folder of a job that was killed when a student had two epochs."""
        out = self.folder()
        Command(self, out).ended(lambda: bool(list(out.glob("epochs/student-*/epoch-2"))))
        if not list(out.glob("epochs/student-*/epoch-2")):
            raise SystemExit("the job ended before it could be cut off; fix: more epochs")
        return out

    def folder(self, source: Path | None = None) -> Path:
        """A new folder, or a copy of one."""
        self._count += 1
        out = self.room / f"{self._count}"
        return out if source is None else Path(shutil.copytree(source, out))

    def wrong(self, out: Path, *ends: Ended, weights: bool = True) -> str:
        """What is not as in the folder of the job that nothing happened to."""
        for end in ends:
            if end.crashed or end.code not in (0, -signal.SIGKILL) or ends[-1].code:
                return f"ended with {end.code}\n{end.said}"
        runs, sums = outcome(out)
        if len(results(out)) != len(runs) or runs != self.whole[0]:
            return "other results"
        if not sums.items() <= self.whole[1].items() or (weights and sums != self.whole[1]):
            return f"other weights: {sorted(set(sums.items()) ^ set(self.whole[1].items()))}"
        if left := sorted(out.glob("epochs/*")):
            return f"{left[0]} is left"
        trained = sum(len(_TRAINED.findall(end.said)) for end in ends)
        return f"{trained} trainings of {self.trainings}" if trained > self.trainings else ""


def finished(out: Path, *, epochs: bool = True) -> Callable[[], str]:
    """Remembers what is finished; the answer says what of it was lost, or was made again."""
    runs = results(out) if (out / "results.json").exists() else []
    files = {file: file.stat().st_mtime_ns for file in out.glob("[!.]*.pt")}
    histories = out.glob("history/*.csv") if epochs else ()  # every row with its seconds
    rows = {file: file.read_text() for file in histories}

    def lost() -> str:
        found = results(out)
        for run in runs:
            if run not in found:
                return f"the result of {run['method']} seed {run['seed']} was lost or made again"
        for file, changed in files.items():
            if not file.exists() or file.stat().st_mtime_ns != changed:
                return f"{file} was lost or made again"
        for file, text in rows.items():
            if not file.read_text().startswith(text):
                return f"epochs in {file} were trained again"
        return ""

    return lost


def killed(job: Job, times: int) -> Iterator[Trial]:
    """At moments that are drawn from as many equal parts of its duration."""
    for number in range(times):
        moment, out = job.seconds * (number + job.draws.random()) / times, job.folder()
        at = time.monotonic() + moment
        first = Command(job, out).ended(lambda at=at: time.monotonic() > at)
        lost = finished(out)
        again = Command(job, out).ended()
        told = f"at {moment:.1f} of {job.seconds:.1f} s" + " (over)" * (not first.code)
        yield (told, job.wrong(out, first, again) or lost())


def two_writers(job: Job, times: int) -> Iterator[Trial]:
    """The second starts at once, and in the midst of the first."""
    for wait in (0.0, job.seconds / 2):
        out = job.folder()
        first = Command(job, out)
        time.sleep(wait)
        second = Command(job, out)
        yield (f"{wait:.1f} s apart", job.wrong(out, first.ended(), second.ended()))


def kinds_of_files(out: Path, *folders: str) -> dict[tuple[str, ...], Path]:
    """One file of each kind: of a folder, what it is of, and its suffix; the newest epoch's."""
    found: dict[tuple[str, ...], Path] = {}
    for file in sorted(out.rglob("*"), reverse=True):
        folder, *_ = file.relative_to(out).parts[:-1] or ("",)
        if file.is_file() and folder in folders and file.stat().st_size:
            found.setdefault((folder, re.split(r"[-.\d]", file.name)[0], file.suffix), file)
    return found


def damaged(job: Job, times: int) -> Iterator[Trial]:
    """Cut to half, and a bit turned in the middle: after the job, and where it was cut off."""
    for base, folders in ((job.out, ("", "history")), (job.cut, ("epochs", "history"))):
        for original in kinds_of_files(base, *folders).values():
            for kind in ("cut short", "flipped"):
                out = job.folder(base)
                file = out / original.relative_to(base)
                damage(file, kind)
                yield (f"{file.relative_to(out)} {kind}", _noticed(job, out, file, original))


def _noticed(job: Job, out: Path, file: Path, original: Path) -> str:
    harmed, stored = file.read_bytes(), out / "results.json"
    before = stored.read_bytes() if stored.exists() else b""
    ended = Command(job, out).ended()
    if ended.crashed or (ended.code == 2 and not ended.names(file)):
        return f"was not refused in one line\n{ended.said}"
    if ended.code == 2:
        if before and stored.read_bytes() != before:
            return "results were changed"
        file.rename(file.with_name(f".{file.name}"))  # as whoever follows the advice
        fresh = ["--fresh"] if "--fresh" in ended.said else []
        return job.wrong(out, Command(job, out, *fresh).ended())
    if file.exists() and file.read_bytes() == harmed:  # who needs it must refuse it
        try:
            READERS[file.suffix](file)
            return "is read as if it were whole"
        except KeyError:
            return "is left damaged"
        except ValueError as error:
            if str(file) not in str(error):
                return f"is not named: {error}"
        shutil.copy2(original, file)
    return job.wrong(out, ended)


def full_disk(job: Job, times: int) -> Iterator[Trial]:
    """No file may be as long as one of a kind; the networks that students share are there."""
    kinds = kinds_of_files(job.out, "") | kinds_of_files(job.cut, "epochs")
    for (folder, role, suffix), original in kinds.items():
        size, out = original.stat().st_size, job.folder()
        if size <= _PROBE:
            continue
        most = max(_PROBE, size * 3 // 4)
        out.mkdir()
        for shared in ("teacher", "matcher"):
            for file in job.out.glob(f"{shared}-*.pt") if shared != role else ():
                shutil.copy2(file, out)
        ended = Command(job, out, most=most).ended()
        lost = finished(out, epochs="could not be kept" not in ended.said)
        told = [line for line in ended.lines("warning") if "could not be" in line]
        unnamed = any(str(out) not in line for line in told)
        if ended.crashed or unnamed or (ended.code and not ended.names(out)):
            wrong = f"no line names the file\n{ended.said}"
        else:  # a student's weights are the smaller loss, and said
            weights = "warning: weights" not in ended.said
            wrong = job.wrong(out, Command(job, out).ended(), weights=weights) or lost()
        yield (f"from {most} bytes, {folder or '.'}/{role}{suffix}", wrong)


def clock(job: Job, times: int) -> Iterator[Trial]:
    """Times of all files, of the images too, before those of archives and long after today."""
    for base, state in ((job.out, "finished"), (job.cut, "cut off")):
        for year, moment in {1970: 3e7, 2096: 4e9}.items():
            out = job.folder(base)
            for file in [*out.rglob("*"), *job.data]:
                os.utime(file, (moment, moment))
            lost = finished(out)
            ended = Command(job, out).ended()
            yield (f"{state}, all files of {year}", job.wrong(out, ended) or lost())


FAULTS = {
    "kill": killed,
    "two writers": two_writers,
    "clock": clock,
    "full disk": full_disk,
    "damage": damaged,
}


def main() -> int:
    """0 where every trial held, else 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=JOBS, default=list(JOBS), metavar="JOB")
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--times", type=int, default=20, help="how often each kind is killed")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and places")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a fork has no other
    # What every job works out of the code, forks then know.
    code_digest(Path(train.__file__).parent, Path(structkd.__file__).parent)
    tried, held = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    with tempfile.TemporaryDirectory() as folder:
        room = Path(folder)
        recipe = layouts.write_recipe(room / "images")
        places = {"recipe": recipe, "scenes": layouts.write_scenes(room / "images/scenes")}
        for name in options.only:
            job = Job(name, room / name.replace(" ", "-"), places, options.seed)
            for fault in options.faults:
                for told, wrong in FAULTS[fault](job, options.times):
                    tried[name, fault] += 1
                    held[name, fault] += not wrong
                    ending = f"FAILED: {wrong}" if wrong else "held"
                    print(f"{name}, {fault}: {told}: {ending}", flush=True)
    print("\n| job | fault | tried | held |\n|---|---|---:|---:|")
    for (name, fault), count in tried.items():
        print(f"| {name} | {fault} | {count} | {held[name, fault]} |")
    print("clock: the times of files jump; the clock itself does not (faketime is not used)")
    return int(held != tried)


if __name__ == "__main__":
    sys.exit(main())
