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
)


def _loaded(statement: str) -> set[str]:
    """Which of the late packages a fresh process holds after a statement."""
    code = f"{statement}\nimport sys\nprint(*[name for name in {LATE} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    return set(done.stdout.split())


def test_import_brings_no_package_that_is_used_later() -> None:
    assert _loaded("import structkd") - _loaded("import torch") == set()


def test_the_look_sees_what_a_use_imports() -> None:
    use = "import torch, structkd\nstructkd.LagrangianPlanner(1.0, 'both')(torch.ones(2, 2))"
    assert "ot" in _loaded(use)
