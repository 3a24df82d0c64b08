"""What the plug-ins say where the package that they serve is missing."""

from __future__ import annotations

import subprocess
import sys

from structkd.integrations._extra import NEEDS


def test_a_missing_package_names_its_extra() -> None:
    code = (
        "import importlib, sys\n"
        "for package, extra in (('timm', 'timm'), ('mmengine', 'mmpretrain')):\n"
        "    sys.modules[package] = None\n"
        "    try:\n        importlib.import_module(f'structkd.integrations.{extra}')\n"
        "    except ImportError as error:\n        print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for extra in ("timm", "mmpretrain"):
        assert f"pip install {NEEDS[extra]}" in done.stdout
