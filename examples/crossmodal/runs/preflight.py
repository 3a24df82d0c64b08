"""What can be known before hours of training: the folder, the networks, every method, the time."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn

from crossmodal.data import Batch
from crossmodal.recipes import Recipe
from crossmodal.runs.store import lock, write_atomically
from crossmodal.training.engine import accelerator_for
from crossmodal.training.steps import Step

_EXTRAS = {
    "matplotlib": "figures are drawn by matplotlib; fix: pip install 'structkd[examples]'",
    "sklearn": "figures are made with scikit-learn; fix: pip install 'structkd[examples]'",
}
_MATCHING = {"faiss": "matching is done by FAISS; fix: pip install 'structkd[cpu]'"}
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
        raise ValueError(
            f"--out {out} cannot be written ({error.strerror or error}); fix: free space, or name "
            "another folder"
        ) from error
    if free < needed:
        raise ValueError(
            f"--out {out} has {free / 1e6:.0f} MB left, about {needed / 1e6:.0f} MB are needed; "
            "fix: free space, or name another folder"
        )


def check_extras(*, matched: bool) -> None:
    """Refuse to start where a package is missing that is needed at the end."""
    for name, text in (_EXTRAS | (_MATCHING if matched else {})).items():
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ValueError(text) from error


def check_device(name: str) -> str:
    """``--device`` as it is; ValueError where nothing can be trained there."""
    if name == "auto":
        return name
    try:
        if float(torch.ones(1, device=name).sum()) != 1:
            raise RuntimeError("it gives wrong sums")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name!r} cannot be used: {reason}") from error
    if torch.device(name).type != "cpu":
        os.environ["ACCELERATE_TORCH_DEVICE"] = name
    return name


def timed(step: Step, batch: Batch, recipe: Recipe, device: str, *, steps: int = 2) -> float:
    """Seconds of a training step, the first one left out.

    Raises:
        ValueError, TypeError, RuntimeError: the method does not fit these networks.
    """
    accelerator = accelerator_for(recipe, device)
    layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
    step.to(accelerator.device, memory_format=layout)
    batch = batch.to(accelerator.device, recipe.channels_last)
    step.train()
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


def chosen_precision(
    recipe: Recipe,
    out: Path,
    name: str,
    make: Callable[[Recipe], tuple[Step, Batch]],
    device: str,
    agreed: Callable[[Any], Any],
) -> tuple[Recipe, str]:
    """A recipe whose precision is settled, and a line on how.

    ``auto`` times some steps in fp32 and in bf16 with channels-last images. The choice is kept in
    ``out``, so that the same command finds its own results however busy the machine is. ``agreed``
    gives all processes of a training the first one's value.
    """
    if recipe.precision != "auto":
        return recipe, ""
    size = recipe.batch_size
    # torch's channels-last backward over an odd number of images has written outside its memory on
    # the CPU (2.15, two threads, batch 19).
    candidate = replace(recipe, precision="bf16", channels_last=size % 2 == 0)
    leads, path = PartialState().is_main_process, out / _CHOICES
    with lock(out, _CHOICES) if leads else nullcontext():
        known = agreed(json.loads(path.read_text()) if path.exists() else {})
        if name not in known:
            tried = (replace(recipe, precision="fp32"), candidate)
            plain, half = (1000 * timed(*make(one), one, device, steps=5) for one in tried)
            chosen = "bf16" if half < _WORTH * plain else "fp32"
            entry = {"precision": chosen, "fp32_ms": round(plain, 2), "bf16_ms": round(half, 2)}
            known = agreed({**known, name: entry})
            if leads:
                text = json.dumps(known, indent=2) + "\n"
                write_atomically(path, lambda file: file.write_text(text))
    found = known[name]
    line = (
        f"precision {found['precision']}: a step took {found['fp32_ms']:g} ms in fp32, "
        f"{found['bf16_ms']:g} ms in bf16 and channels last (--precision fixes it)"
    )
    if found["precision"] == "bf16":
        return candidate, line
    return replace(recipe, precision="fp32"), line


def weight(network: nn.Module) -> int:
    """Bytes of a network's weights."""
    return sum(value.numel() * value.element_size() for value in network.state_dict().values())


def duration(seconds: float) -> str:
    """``2 h 05 min``, ``3 min``, ``40 s``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"
