"""What ``import structkd`` costs: a package that few need is imported where it is used."""

from __future__ import annotations

import subprocess
import sys

LATE = (
    "ot",
    "faiss",
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.tensor",
    "timm",
    "sklearn",
    "scipy",
    "pandas",
    "matplotlib",
    "mmengine",
    "mmpretrain",
)


def _loaded(*statements: str) -> list[set[str]]:
    """Which of the late packages a fresh process holds after each statement."""
    look = f"print(*[name for name in {LATE} if name in sys.modules])"
    code = "\n".join(["import sys", *(f"{statement}\n{look}" for statement in statements)])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    return [set(line.split()) for line in done.stdout.splitlines()]


def test_import_brings_no_package_that_is_used_later() -> None:
    use = "structkd.LagrangianPlanner(1.0, 'both')(torch.ones(2, 2))"
    before, after, used = _loaded("import torch", "import structkd", use)
    assert after - before == set()
    assert "ot" in used - after  # the look sees what a use imports
