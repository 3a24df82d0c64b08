"""The library alone, and what it says where an optional package is missing."""

from __future__ import annotations

import subprocess
import sys

import pytest

from structkd.integrations._extra import NEEDS


def _run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def test_the_library_imports_no_training_loop() -> None:
    code = "import structkd, sys; print({'timm', 'mmengine', 'mmpretrain'} & set(sys.modules))"
    assert _run(code).strip() == "set()"


@pytest.mark.parametrize(("package", "extra"), [("timm", "timm"), ("mmengine", "mmpretrain")])
def test_a_missing_package_names_its_extra(package: str, extra: str) -> None:
    said = _run(
        f"import sys; sys.modules['{package}'] = None\n"
        f"try:\n    import structkd.integrations.{extra}\n"
        "except ImportError as error:\n    print(error)"
    )
    assert f"pip install {NEEDS[extra]}" in said
