"""The progress of a run: a bar, or plain lines where output is piped, and the history."""

from __future__ import annotations

import csv
import re
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, Progress
from torch import Tensor

from store import key, write_atomically

CHECKSUM = "checksum"  # the last column of a history
_QUIET = 10.0  # seconds between two lines of one training, where output is piped


class Show:
    """Progress of one training after another; each epoch into a CSV, and TensorBoard if asked for.

    ``run`` of ``runs`` is the job's training under way; ``quiet`` are a training's other processes.
    """

    def __init__(
        self, console: Console, out: Path, *, board: bool = False, quiet: bool = False
    ) -> None:
        self.console, self.out, self.board, self.quiet = console, out, board, quiet
        self.run = self.runs = 0
        self._warned: set[str] = set()
        self._said: set[str] = set()
        self._bar: Progress | None = None
        self._history: Path | None = None
        self._board = None

    def begin(self, label: str, epochs: int, steps: int, done: int) -> None:
        """A training starts, or resumes after ``done`` epochs."""
        self.label, self._epochs, self._steps, self._done = label, epochs, steps, done
        self._spoke = 0.0
        if self.quiet:
            return
        if done:
            self.say(f"{label}: resumes after epoch {done} of {epochs}")
        if self.console.is_terminal:
            columns = "{task.description}", BarColumn(10), "{task.fields[text]}"
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self._name, total=epochs * steps, text="")

    def keep(self, history: Path | None, board: str = "") -> None:
        """Where the epochs of the next training go."""
        self._history, self._warned, self._board = history, set(), None
        if self.board and board and not self.quiet:
            from accelerate.tracking import TensorBoardTracker

            self._board = TensorBoardTracker(board, self.out / "tensorboard")
            self._board.start()

    def step(self, number: int, means: Callable[[], dict[str, float]]) -> None:
        if self._bar is not None:
            done = self._done * self._steps + number
            text = f"epoch {self._done + 1}/{self._epochs}  {shown(means())}"
            self._bar.update(self._task, completed=done, text=text)

    def epoch(self, history: list[dict[str, float]]) -> None:
        """An epoch is over; ``history`` has a row for each so far."""
        self._done = len(history)
        row, now = history[-1], time.perf_counter()
        if self.quiet:
            return
        if self._history is not None:
            rows = [{**r, CHECKSUM: row_checksum(r)} for r in history]
            names = [*dict.fromkeys(name for r in history for name in r), CHECKSUM]

            def written(path: Path) -> None:
                with path.open("w", newline="") as file:
                    writer = csv.DictWriter(file, names, lineterminator="\n")
                    writer.writeheader()
                    writer.writerows(rows)

            try:
                write_atomically(self._history, written)
            except OSError as error:
                self.warn(str(error))
        if self._board is not None:
            self._board.log({k: v for k, v in row.items() if k != "epoch"}, step=self._done)
        if self._bar is None and (now - self._spoke > _QUIET or self._done == self._epochs):
            self._spoke = now
            per_epoch = sum(r["seconds"] for r in history) / len(history)
            left = timedelta(seconds=round(per_epoch * (self._epochs - self._done)))
            hidden = ("epoch", "seconds", "images_per_second")
            self.say(
                f"{self._name}  epoch {self._done}/{self._epochs}  "
                f"{shown({k: v for k, v in row.items() if k not in hidden})}  "
                f"{row['images_per_second']:.0f} images/s  {left} left"
            )

    def warn(self, text: str) -> None:
        """Print a warning; a training prints each kind once, whatever its numbers are."""
        kind = re.sub(r"[\d.]+", "", text)
        if not self.quiet and kind not in self._warned:
            self._warned.add(kind)
            self.say(f"warning: {text}")

    def once(self, text: str) -> None:
        """Print a line only once."""
        if text not in self._said:
            self._said.add(text)
            self.say(text)

    def say(self, text: str) -> None:
        if not self.quiet:
            self.console.print(text, soft_wrap=True, markup=False, highlight=False)

    def end(self) -> None:
        """The training is over, one way or another."""
        if self._bar is not None:
            self._bar.stop()
        if self._board is not None:
            self._board.finish()
        self._bar = self._board = None

    @property
    def _name(self) -> str:
        return f"[{self.run} of {self.runs}] {self.label}" if self.runs else self.label


def row_checksum(row: Mapping[str, float]) -> str:
    """What stands beside a row of the history, so that a damaged one is not taken for true."""
    return key({name: float(value) for name, value in row.items()})


def shown(means: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.3g}" for name, value in means.items())


def collapsed(began: Any, now: Any) -> str | None:
    """The warning for layers whose filters were thrown far, in nearly one direction."""
    lost = [
        f"{name} (norm {old.norm:.2g} to {now[name].norm:.2g}, rank {old.rank:.1f} to "
        f"{now[name].rank:.1f})"
        for name, old in began.items()
        if now[name].norm > 4 * old.norm and now[name].rank < 0.8 * old.rank
    ]
    told = f"the filters of {', '.join(lost)} collapsed, the run may be lost; fix: --clip agc:0.1"
    return told if lost else None


class Running:
    """Means of an epoch's terms, and its predictions by class, on their device until read."""

    def __init__(self, classes: Sequence[str]) -> None:
        self._classes, self._names = classes, ()
        self._sums: Any = 0.0
        self._count, self._calls = 0, None  # images by true class and by class that they are called

    @torch.no_grad()
    def add(self, terms: dict[str, Tensor], logits: Tensor | None, target: Tensor) -> None:
        self._names, self._count = tuple(terms), self._count + 1
        self._sums = self._sums + torch.stack([t.detach().float() for t in terms.values()])
        if logits is None:
            return
        if self._calls is None:
            self._calls = target.new_zeros(logits.shape[1] + 1, logits.shape[1])
        true = torch.where(target < 0, logits.shape[1], target)  # the last row: no label
        places = (true * logits.shape[1] + logits.argmax(1)).flatten()  # of images or pixels
        self._calls.view(-1).index_add_(0, places, torch.ones_like(places))

    def means(self, accelerator: Accelerator | None = None) -> dict[str, float]:
        """The means so far, over all processes where their accelerator is given."""
        numbers, calls = self._sums / self._count, self._calls
        if accelerator is not None:
            numbers = accelerator.reduce(numbers, "mean")
            calls = None if calls is None else accelerator.reduce(calls.clone())
        found = {"loss": float(numbers.sum())}
        found |= dict(zip(self._names, numbers.tolist(), strict=True))
        if calls is not None and (labelled := int(calls[:-1].sum())):
            found["accuracy"] = 100 * int(calls.diagonal().sum()) / labelled
        return found

    def one_class(self) -> str | None:
        """The warning for predictions that are nearly all of one class."""
        if self._calls is None:
            return None
        called, true = self._calls.sum(0), self._calls[:-1].sum(1)
        predicted, true = (row / row.sum().clamp_min(1) for row in (called, true))
        label = int(predicted.argmax())
        if predicted[label] < 0.95 or true[label] > 0.9:
            return None
        return (
            f"{100 * float(predicted[label]):.0f} % of the predictions are "
            f"{self._classes[label]!r}, but {100 * float(true[label]):.0f} % of the labels: the "
            "training may be lost"
        )
