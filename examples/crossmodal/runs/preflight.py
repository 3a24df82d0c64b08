"""What can be known before hours of training: the folder, the networks, every method, the time."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn

from crossmodal.data import Images
from crossmodal.errors import first_line
from crossmodal.recipes import Recipe
from crossmodal.runs.epochs import SETTINGS
from crossmodal.runs.processes import agreed, held
from crossmodal.runs.store import Checkpoint, Results, differing, slug, write_json
from crossmodal.runs.trainings import Trainings
from crossmodal.training.engine import Training, accelerator_for

_EXAMPLES, _CPU = "pip install 'structkd[examples]'", "pip install 'structkd[cpu]'"
_SPACE = "fix: free space, or name another folder"
_CHOICES = "precision.json"
# Half precision costs some accuracy of the numbers: it must be worth it.
_WORTH = 0.8


def check_folder(out: Path, needed: float = 0.0) -> None:
    """Refuse an ``--out`` that cannot be written, or has not got ``needed`` bytes left."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".probe.{os.getpid()}"
        probe.write_bytes(b"0" * 4096)
        probe.unlink()
        free = shutil.disk_usage(out).free
    except FileExistsError as error:
        raise ValueError(f"--out {out} is a file; fix: name a folder") from error
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"--out {out} cannot be written ({reason}); {_SPACE}") from error
    if free < needed:
        have, want = (f"{size / 1e6:.0f} MB" for size in (free, needed))
        raise ValueError(f"--out {out} has {have} left, about {want} are needed; {_SPACE}")


def check_extras(*, matched: bool) -> None:
    """Refuse to start where a package is missing that is needed at the end."""
    needed = {"matplotlib": ("figures are drawn by matplotlib", _EXAMPLES),
              "sklearn": ("figures are made with scikit-learn", _EXAMPLES),
              "faiss": ("matching is done by FAISS", _CPU)}  # fmt: skip
    for name, (text, fix) in needed.items():
        try:
            if matched or name != "faiss":
                importlib.import_module(name)
        except ImportError as error:
            raise ValueError(f"{text}; fix: {fix}") from error


def check_device(name: str) -> None:
    """Refuse a ``--device`` on which nothing can be trained."""
    if name == "auto":
        return
    try:
        if float(torch.ones(1, device=name).sum()) != 1:
            raise RuntimeError("it gives wrong sums")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name!r} cannot be used: {reason}") from error
    if torch.device(name).type != "cpu":
        os.environ["ACCELERATE_TORCH_DEVICE"] = name


def check_network(role: str, name: str, network: nn.Module, images: Images) -> None:
    """Refuse a network that does not take the images' size."""
    shape = images.shape
    try:
        with torch.no_grad():
            network.eval()(torch.zeros(1, *shape))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ValueError(
            f"--{role} {name} does not take images of {'x'.join(map(str, shape))} "
            f"({first_line(error)}); fix: another network, or --size N where the data set has it"
        ) from error


def check_resume(results: Results, wanted: Sequence[Checkpoint]) -> None:
    """Refuse ``--resume`` where nothing was kept, or epochs of another training."""
    kept = results.folder / "epochs"
    others = list(kept.glob(f"*/{SETTINGS}"))
    if not others and not results.runs() and not any(c.path.exists() for c in wanted):
        fix = "fix: leave it out, or name the folder of the run that was cut off"
        raise ValueError(f"--resume: nothing was kept in {results.folder}; {fix}")
    for checkpoint in wanted:
        if checkpoint.path.exists():  # finished: epochs of others are no reason to refuse
            continue
        found = [p for p in others if p.parent.name.startswith(f"{slug(checkpoint.role)}-")]
        if found and not (kept / checkpoint.name).exists():
            other = ", ".join(differing(json.loads(found[0].read_text()), checkpoint.settings))
            made = f"the epochs in {found[0].parent} were made with another {other}"
            raise ValueError(f"--resume: {made}; fix: give the same options, or leave it out")


def timed(training: Training, device: str, *, steps: int = 2) -> float:
    """Seconds of a training step; what it raises where a method does not fit is the method's."""
    step, recipe = training.step, training.recipe
    accelerator = accelerator_for(recipe, device)
    step.to(accelerator.device, memory_format=recipe.layout).train()
    batch = training.batches.first()
    seconds = []
    for _ in range(1 + steps):
        started = time.perf_counter()
        with accelerator.autocast():
            _, terms = step(batch)
        torch.stack([term.float() for term in terms.values()]).sum().backward()
        step.zero_grad()
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def estimated(training: Training, device: str) -> float:
    return timed(training, device) * len(training.batches) * training.recipe.epochs


def _choices(path: Path) -> dict[str, Any]:
    """The precisions that were measured in a folder."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
        for entry in found.values():
            if not {"precision", "fp32_ms", "bf16_ms"} <= entry.keys():
                raise ValueError("an entry lacks its times")
    except (ValueError, AttributeError) as error:
        told = f"{path} is damaged ({error}); fix: delete it, and the precision is measured again"
        raise ValueError(told) from error
    return dict(found)


def settled(trainings: Trainings) -> tuple[dict[str, Recipe], str]:
    """The recipes with their precision settled, and a line on how.

    ``auto`` times some steps in fp32 and in bf16 with channels-last images. The choice is kept in
    ``--out``, so that the same command finds its own results however busy the machine is, and is
    taken over from the folders near it.
    """
    job, recipes = trainings.job, dict(trainings.recipes)
    student, path = recipes["student"], job.out / _CHOICES
    if "auto" not in {recipe.precision for recipe in recipes.values()}:
        return recipes, ""
    fp32 = {"precision": "fp32"}
    # torch's channels-last backward over an odd number of images has written outside its memory on
    # the CPU (2.15, two threads, batch 19).
    bf16 = {"precision": "bf16", "channels_last": student.batch_size % 2 == 0}
    name = f"{PartialState().device.type}, {job.models['teacher']}, batch {student.batch_size}"
    with held(job.out, _CHOICES, waiting=lambda: None):
        known = agreed(_choices(path))
        if name not in known:
            near = agreed([_choices(folder / _CHOICES) for folder in job.near])
            entry = next((some[name] for some in near if name in some), None)
            if entry is None:
                # The teacher's step is the longer one, and the one that most depends on it.
                tried = (replace(student, **fields) for fields in (fp32, bf16))
                steps = (
                    replace(trainings, recipes={"teacher": one}).shared("teacher") for one in tried
                )
                plain, half = (1000 * timed(step, job.device, steps=5) for step in steps)
                chosen = "bf16" if half < _WORTH * plain else "fp32"
                entry = {"precision": chosen, "fp32_ms": round(plain, 2), "bf16_ms": round(half, 2)}
            known = agreed({**known, name: entry})
            if PartialState().is_main_process:
                write_json(path, known)
    found = known[name]
    for role, recipe in recipes.items():
        if recipe.precision == "auto" and found["precision"] == "bf16":
            last = recipe.channels_last or recipe.batch_size % 2 == 0
            recipes[role] = replace(recipe, precision="bf16", channels_last=last)
        elif recipe.precision == "auto":
            recipes[role] = replace(recipe, precision="fp32")
    return recipes, (
        f"precision {found['precision']}: a step took {found['fp32_ms']:g} ms in fp32, "
        f"{found['bf16_ms']:g} ms in bf16 and channels last (--precision fixes it)"
    )
