"""What stays in ``--out``: results, finished networks, epochs under way; each whole or not there.

Several processes may work in one folder: each run and each file is written by the holder of its
lock, and what others wrote is read again before anything is written.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from torch import Tensor, nn

import structkd

RESULTS = "results.json"
HELPER = "STRUCTKD_HELPER"  # set for the processes that --jobs starts
Run = dict[str, Any]


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` on a temporary file beside ``path`` and rename it: never half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last: matplotlib reads the format from it.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(temporary)
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch's writer raises either where a disk is full
        raise OSError(f"{path} could not be written ({first_line(error)})") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(path, lambda file: file.write_text(text))


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def slug(name: str) -> str:
    """A name that a file can have; a long one is cut and gets a hash, so that names stay apart."""
    plain = re.sub(r"[^\w.+=-]+", "_", name).strip("_")
    return plain if len(plain) <= 80 else f"{plain[:70]}-{key({'name': name})}"


def key(settings: Mapping[str, Any]) -> str:
    """Eight hex digits that stand for settings, which are plain JSON values."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def code_digest(*places: Path) -> str:
    """Eight hex digits that stand for what Python code does, without comments and docstrings."""
    digest = hashlib.sha256()
    for place in places:
        for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(f"{file.name}\n{_what_it_does(file, file.stat().st_mtime_ns)}\n".encode())
    return digest.hexdigest()[:8]


@cache
def _what_it_does(file: Path, changed: int) -> str:
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            first.value = ast.Constant(None)
    return ast.unparse(tree)


def differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Names under which two settings differ, those of inner ones with a dot."""
    found = []
    for name in sorted({*first, *second}):
        one, two = first.get(name), second.get(name)
        if isinstance(one, dict) and isinstance(two, dict):
            found += [f"{name}.{inner}" for inner in differing(one, two)]
        elif one != two:
            found.append(name)
    return found


def agreed(value: Any) -> Any:
    """The value of the first process, in all processes of a training."""
    (found,) = broadcast_object_list([value])
    return found


def lock(folder: Path, name: str) -> FileLock:
    """A lock of this folder; the system frees it when its holder dies."""
    (folder / ".locks").mkdir(parents=True, exist_ok=True)
    return FileLock(folder / ".locks" / f"{slug(name)}.lock")


@contextmanager
def held(folder: Path, name: str, *, waiting: Callable[[], object] | None = None) -> Iterator[bool]:
    """Hold a lock for all processes of this training; returns whether it is held.

    If another process holds it, ``waiting`` is called and this one waits; without ``waiting`` it
    gives up.
    """
    ours, mine = lock(folder, name), True
    if PartialState().is_main_process:
        try:
            ours.acquire(timeout=0)
        except Timeout:
            mine = waiting is not None
            if waiting is not None:
                waiting()
                ours.acquire()
    try:
        yield agreed(mine)
    finally:
        ours.release()


def helpers(count: int) -> list[subprocess.Popen[bytes]]:
    """So many more processes of this very command; each takes the next free student."""
    if count < 1:
        return []
    devices = torch.cuda.device_count() if PartialState().device.type == "cuda" else 0
    threads = max((os.cpu_count() or 1) // (count + 1), 1)
    torch.set_num_threads(threads)
    found = []
    for number in range(1, count + 1):
        environment = {**os.environ, HELPER: "1", "OMP_NUM_THREADS": str(threads)}
        if devices:
            environment["CUDA_VISIBLE_DEVICES"] = str(number % devices)
        found.append(subprocess.Popen([sys.executable, *sys.argv], env=environment))
    return found


class Store:
    """``results.json``: every finished run with its settings; written again after each run.

    Runs of other settings stay in the file; a run is known by method, seed and settings, and has
    its ``measure`` or says why it failed. A damaged file, by its checksum, is a ValueError.
    """

    def __init__(self, folder: Path, measure: str = "accuracy") -> None:
        self.folder, self.path, self.measure = folder, folder / RESULTS, measure
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".probe.{os.getpid()}"
            probe.write_bytes(b"0" * 4096)
            probe.unlink()
        except FileExistsError as error:
            raise ValueError(f"--out {folder} is a file; fix: name a folder") from error
        except OSError as error:
            reason = error.strerror or error
            raise ValueError(
                f"--out {folder} cannot be written ({reason}); fix: name another folder"
            ) from error
        self.runs()

    def runs(self) -> list[Run]:
        return list(self._content().get("runs", []))

    def find(self, method: str, seed: int, config: Mapping[str, Any]) -> Run | None:
        """The finished run of these settings, or None."""
        wanted = (method, seed, key(config))
        return next((run for run in self.runs() if _identity(run) == wanted), None)

    def by_other_code(self, method: str, seed: int, config: Mapping[str, Any]) -> Run | None:
        """A finished run of these settings that other code made, or None."""

        def plain(given: Mapping[str, Any]) -> str:
            loss = {k: v for k, v in given.get("loss", {}).items() if k != "own code"}
            return key({k: v for k, v in given.items() if k != "code"} | {"loss": loss})

        wanted = (method, seed, plain(config))
        runs = ((run["method"], run["seed"], plain(run["config"])) for run in self.runs())
        return next(
            (r for r, known in zip(self.runs(), runs, strict=True) if known == wanted), None
        )

    def write(self, header: Mapping[str, Any], *new: Run) -> None:
        """Write the header's entries and new runs; the others stay as they are."""
        replaced = {_identity(run) for run in new}
        with lock(self.folder, RESULTS):
            old = self._content()
            commands = [c for c in old.get("commands", []) if c != header.get("command")]
            kept = [run for run in old.get("runs", []) if _identity(run) not in replaced]
            commands.append(header.get("command"))
            more = {"commands": commands, "versions": versions(), "runs": [*kept, *new]}
            content = json.loads(json.dumps({**header, **more}))  # as it will be read
            write_json(self.path, {**content, "checksum": key(content)})

    def _content(self) -> dict[str, Any]:
        if not self.path.exists():
            return {}
        try:
            content = json.loads(self.path.read_text())
            if content.pop("checksum", None) not in (None, key(content)):
                raise ValueError("its checksum is another; if you changed it, delete that line")
            for run in content["runs"]:
                _identity(run)
                if self.measure not in run and "failed" not in run:
                    raise KeyError(self.measure)
            return dict(content)
        except (ValueError, KeyError, TypeError) as error:
            told = f"{self.path} is damaged ({error!r}); fix: move it away and run again"
            raise ValueError(told) from error


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version(), "structkd": structkd.__version__}
    return found | {name: metadata.version(name) for name in ("torch", "timm", "numpy")}


def _identity(run: Run) -> tuple[str, int, str]:
    return run["method"], run["seed"], key(run["config"])


@dataclass(frozen=True)
class Checkpoint:
    """A finished network in a file named after everything that its weights depend on.

    Other settings make another name, so no checkpoint is ever overwritten by a different one.
    """

    folder: Path
    role: str  # teacher, matcher, or student with method and seed
    settings: dict[str, Any]  # all that the weights depend on; plain JSON values

    @property
    def name(self) -> str:
        return slug(f"{self.role}-{self.settings.get('model', '')}-{key(self.settings)}")

    @property
    def path(self) -> Path:
        return self.folder / f"{self.name}.pt"

    def save(self, model: nn.Module, **facts: Any) -> None:
        """Write the weights, their checksum, the settings, and what is needed to use them."""
        weights = {name: value.detach().cpu() for name, value in model.state_dict().items()}
        content = {"weights": weights, "sha256": digest(weights), "settings": self.settings}
        content |= {"structkd": structkd.__version__, **facts}
        write_atomically(self.path, lambda file: torch.save(content, file))

    def load_into(self, network: nn.Module) -> dict[str, Any] | None:
        """Load the weights if they are there; returns all that the file holds, or None.

        Raises:
            ValueError: The file is damaged, or has other settings.
        """
        if not self.path.exists():
            return None
        content = read_checkpoint(self.path)
        if content["settings"] != self.settings:
            others = ", ".join(differing(content["settings"], self.settings))
            raise _refused(self.path, f"was made with another {others}")
        try:
            network.load_state_dict(content["weights"])
        except RuntimeError as error:
            raise _refused(self.path, f"does not fit {type(network).__name__}") from error
        return content


def read_checkpoint(path: Path) -> dict[str, Any]:
    """All that a file holds.

    Raises:
        ValueError: The file is damaged, or no checkpoint of these examples.
    """
    try:
        with zipfile.ZipFile(path) as parts:  # torch does not look at these checksums
            if (broken := parts.testzip()) is not None:
                raise ValueError(f"{broken} has another checksum")
        content = torch.load(path, map_location="cpu", weights_only=True)
        if digest(content["weights"]) != content["sha256"] or "settings" not in content:
            raise ValueError("its checksum is another")
    except Exception as error:  # the unpickler raises almost anything on damaged bytes
        if isinstance(error, OSError) and error.filename:  # it is not there, or may not be read
            raise
        raise _refused(path, f"is damaged ({type(error).__name__})") from error
    return dict(content)


def digest(weights: Mapping[str, Tensor]) -> str:
    """A checksum of names, shapes and bytes."""
    found = hashlib.sha256()
    for name, value in weights.items():
        found.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        found.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _refused(path: Path, reason: str) -> ValueError:
    # A student's result is kept apart, so that without its weights it still counts as finished.
    fresh = " with --fresh" if path.name.startswith("student-") else ""
    return ValueError(f"checkpoint {path} {reason}; fix: move it away and run again{fresh}")


@dataclass
class Epochs:
    """The last two epochs of a training under way, in ``folder/epoch-N``: all that it goes on from.

    A folder is renamed into its place when it is whole, and has the checksum of each of its files.
    """

    folder: Path
    settings: Mapping[str, Any]
    tell: Callable[[str], None]  # where to say that something could not be kept or read

    def save(self, accelerator: Accelerator, history: list[dict[str, float]]) -> None:
        """Keep the last epoch; if that fails, the training warns and goes on."""
        epoch = len(history)
        temporary, place = self.folder / f".{epoch}.part", self.folder / f"epoch-{epoch}"
        try:
            if accelerator.is_main_process:
                for old in (temporary, place):  # of a run that was cut off here
                    shutil.rmtree(old, ignore_errors=True)
                temporary.mkdir(parents=True)
                write_json(self.folder / "settings.json", self.settings)
            accelerator.wait_for_everyone()
            accelerator.save_state(str(temporary), safe_serialization=False)
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                torch.save({"history": history}, temporary / "extra.pt")
                sums = {file.name: _sum(file) for file in sorted(temporary.iterdir())}
                (temporary / "manifest.json").write_text(json.dumps(sums))
                temporary.replace(place)
                for old in self._found()[2:]:
                    shutil.rmtree(old)
        except (OSError, RuntimeError) as error:  # torch's writer raises either
            shutil.rmtree(temporary, ignore_errors=True)
            self.tell(f"{place} could not be kept ({first_line(error)}); training goes on")
        accelerator.wait_for_everyone()

    def resume(self, accelerator: Accelerator) -> list[dict[str, float]]:
        """Bring the training to the last whole epoch; returns its history, or an empty list.

        Where epochs were kept and all are damaged, it is a ValueError.
        """
        place = agreed(self._last_whole() if accelerator.is_main_process else None)
        if place is None:
            return []
        accelerator.load_state(place)
        kept = torch.load(Path(place) / "extra.pt", map_location="cpu", weights_only=True)
        return list(kept["history"])

    def clear(self) -> None:
        """Delete the epochs, once the training is over and stored."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _last_whole(self) -> str | None:
        damaged = []
        for place in self._found():
            if (reason := _damage(place)) is None:
                return str(place)
            damaged.append(f"{place} is damaged ({reason})")
            self.tell(f"checkpoint {damaged[-1]}; going on from the one before")
        if damaged:
            fix = f"fix: delete {self.folder} to train from the start"
            raise ValueError(f"checkpoint {'; '.join(damaged)}; {fix}")
        return None

    def _found(self) -> list[Path]:
        return sorted(self.folder.glob("epoch-*"), key=lambda place: -int(place.name[6:]))


def _damage(place: Path) -> str | None:
    try:
        sums = json.loads((place / "manifest.json").read_text())
        for name, wanted in sums.items():
            if _sum(place / name) != wanted:
                return f"{name} has another checksum"
    except (OSError, ValueError, AttributeError) as error:
        return str(error) or type(error).__name__
    return None


def _sum(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
