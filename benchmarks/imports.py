"""What `import structkd` adds to `import torch`, each import in a fresh process.

The processes take turns, so that other load meets all alike; the table has the least time of each.
A process does nothing but the import, and its time is read inside it: Python's own start is not in.
POT and FAISS, which the library imports where it uses them, stand beside it.

    python benchmarks/imports.py [--repeat 10] [--quick]
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from _report import machine, seconds, table

STATEMENTS = {
    "torch": "import torch",
    "torch, structkd": "import torch, structkd",
    "torch, structkd, POT": "import torch, structkd, ot.batch",
    "torch, structkd, FAISS": "import torch, structkd, faiss",
}


def imported(statement: str) -> float:
    """Returns the seconds that a statement takes in a fresh process."""
    clock = "import time; start = time.perf_counter()"
    code = f"{clock}\n{statement}\nprint(time.perf_counter() - start)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="2 repeats")
    args = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    for turn in range(1 + (2 if args.quick else args.repeat)):
        for name, statement in STATEMENTS.items():
            spent = imported(statement)
            # The first turn reads the files from the disk.
            if turn:
                times[name].append(spent)
    least = {name: min(spent) for name, spent in times.items()}
    base = least["torch"]
    rows = [
        [name, seconds(spent), seconds(spent - base), f"{spent / base:.2f} x"]
        for name, spent in least.items()
    ]
    print(f"{machine()}\n")
    print(table(["import", "time", "over torch", "against torch"], rows))


if __name__ == "__main__":
    main()
