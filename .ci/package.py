"""Checks what `make package` built: the sdist whole, the wheel alone in a bare environment.

A bare environment has the wheel, what the wheel requires without extras, and what that requires
in turn, each linked from the environment that runs this script, as torch is too large to copy.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
from importlib.metadata import Distribution, distribution
from pathlib import Path
from zipfile import ZipFile

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

USE = """
import importlib.util, sys
import torch, structkd

assert structkd.__file__.startswith(sys.prefix), structkd.__file__
for name in ("timm", "faiss", "mmengine", "matplotlib", "pytest"):
    assert importlib.util.find_spec(name) is None, f"{name} is here: this environment is not bare"
net = lambda width: torch.nn.Sequential(
    torch.nn.Conv2d(3, width, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
    torch.nn.Linear(width, 5))
layers = {"intermediate": "0", "embedding": "3:input"}
whole = structkd.Distiller(net(4), net(6), [structkd.DSLoss, "KDLoss"], layers=layers)
output, terms = whole(torch.randn(4, 3, 8, 8), x_teacher=torch.randn(4, 3, 8, 8))
sum(terms.values()).backward()
assert all(p.grad.isfinite().all() for p in whole.student.parameters())
assert structkd.LagrangianPlanner(1.0, "both")(torch.rand(3, 3)).plan.isfinite().all()
gallery = structkd.RetrievalGallery(4)
try:
    import structkd.integrations.timm
except ImportError as error:
    print(error)
else:
    raise AssertionError("the plug-in for timm was imported without timm")
print("structkd", structkd.__version__, "runs in", sys.prefix)
"""


def tracked() -> set[str]:
    """Returns all files that git keeps, which a source distribution has to hold."""
    said = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, check=True)
    return set(said.stdout.split("\0")) - {""}


def sdist_files(archive: Path) -> set[str]:
    """Returns the files of a source distribution, without its own PKG-INFO."""
    with tarfile.open(archive) as held:
        names = {member.name.partition("/")[2] for member in held if not member.isdir()}
    return names - {"PKG-INFO"}


def required(wheel: Path) -> dict[str, Distribution]:
    """Returns what an installed wheel needs without extras, and what that needs in turn."""
    with ZipFile(wheel) as held:
        place = next(name for name in held.namelist() if name.endswith(".dist-info/METADATA"))
        lines = held.read(place).decode().partition("\n\n")[0].splitlines()
    asked = [line.partition(": ")[2] for line in lines if line.startswith("Requires-Dist: ")]
    found: dict[str, Distribution] = {}
    while asked:
        need = Requirement(asked.pop())
        name = canonicalize_name(need.name)
        if name in found or (need.marker and not need.marker.evaluate({"extra": ""})):
            continue
        found[name] = distribution(name)
        asked += found[name].requires or []
    return found


def bare(folder: Path, wheel: Path) -> Path:
    """Makes an environment with the wheel and what it requires; returns its Python."""
    venv.create(folder, symlinks=True)
    scheme = sysconfig.get_paths("venv", {"base": str(folder), "platbase": str(folder)})
    room = Path(scheme["purelib"])
    for held in required(wheel).values():
        tops = {file.parts[0] for file in held.files or () if file.parts[0] != ".."}
        for top in tops - {"__pycache__"}:
            source = Path(str(held.locate_file(top)))
            if not (room / top).exists() and source.exists():
                (room / top).symlink_to(source)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", str(wheel)], check=True)
    subprocess.run([*pip, "check"], check=True)
    return python


def main() -> int:
    """Returns 0, or 1 after a line on stderr that says what is wrong."""
    (wheel,), (archive,) = Path("dist").glob("*.whl"), Path("dist").glob("*.tar.gz")
    kept, shipped = tracked(), sdist_files(archive)
    if kept != shipped:
        print(
            f"{archive.name} lacks {sorted(kept - shipped)} and holds {sorted(shipped - kept)}, "
            "which git does not keep; commit or ignore them",
            file=sys.stderr,
        )
        return 1
    with tempfile.TemporaryDirectory() as folder:
        python = bare(Path(folder) / "bare", wheel.resolve())
        subprocess.run([python, "-c", USE], check=True, cwd=folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
