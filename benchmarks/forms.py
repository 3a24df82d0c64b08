"""CORAL and cross-correlation: the d x d matrix form against the B x B Gram form.

Each case runs forward and backward in a process of its own: the time is the least of several, the
memory the rise of the peak resident size over what stood before the first call (the inputs, and
what a call on a small batch left). Embeddings are Gaussian, the student's the teacher's with noise.

    python benchmarks/forms.py [--quick]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys

CRITERIA = ("CORAL", "cross-correlation")
GRID = (
    (32, 32), (32, 64), (32, 128), (32, 256), (32, 512), (64, 64), (64, 128), (64, 256),
    (64, 512), (64, 1024), (128, 128), (128, 256), (128, 512), (128, 1024), (128, 2048),
    (256, 256), (256, 512), (256, 1024), (256, 2048), (128, 8192), (64, 25_088),
)  # fmt: skip
QUICK = ((32, 32), (32, 64), (32, 256), (32, 512))


def run_case(name: str, form: str, batch: int, width: int, threads: int, repeat: int) -> None:
    """Runs in the child: prints seconds and bytes as JSON."""
    import torch
    from _report import best_time

    from structkd import CORALLoss, CrossCorrelationLoss

    torch.set_num_threads(threads)
    criterion = (
        CORALLoss(form=form)
        if name == "CORAL"
        else CrossCorrelationLoss(form=form, projector="none")
    )

    def call(student: torch.Tensor, teacher: torch.Tensor) -> float:
        student.grad = None
        loss = criterion(student, teacher)
        loss.backward()
        return float(loss)

    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(batch, width, generator=generator)
    student = teacher + torch.randn(batch, width, generator=generator)
    student.requires_grad_()
    call(student[:, :8].detach().requires_grad_(), teacher[:, :8])
    before = peak()
    value = call(student, teacher)
    memory = peak() - before
    # Short calls are timed in bunches, so that the clock's grain does not count.
    once = best_time(lambda: call(student, teacher), 1)
    bunch = max(1, min(200, int(0.02 / once)))
    spent = best_time(lambda: [call(student, teacher) for _ in range(bunch)], repeat) / bunch
    print(json.dumps({"seconds": spent, "memory": memory, "value": value}))


def peak() -> int:
    """Returns the peak resident size in bytes."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


def child(*arguments: object) -> dict[str, float]:
    command = [sys.executable, __file__, "--case", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(
            f"the case {' '.join(map(str, arguments))} ended with {done.returncode}, out of memory "
            f"perhaps (skip it with --largest):\n{done.stderr[-500:]}"
        )
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--largest", type=int, default=25_088, help="greatest d")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--case", nargs=6, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        name, form, *numbers = args.case
        run_case(name, form, *map(int, numbers))
        return
    from _report import machine, seconds, set_threads, table

    set_threads(args.threads)
    print(f"{machine()}\n")
    for name in CRITERIA:
        rows = []
        wins: dict[int, float] = {}
        for batch, width in QUICK if args.quick else GRID:
            if width > args.largest:
                continue
            # 3 matrices of 25,088^2 and their gradients: minutes and many gigabytes for one call.
            repeat = 1 if batch * width > 500_000 else args.repeat
            matrix, gram = (
                child(name, form, batch, width, args.threads, repeat) for form in ("matrix", "gram")
            )
            ratio = matrix["seconds"] / gram["seconds"]
            if ratio < 1:
                wins.pop(batch, None)
            else:
                wins.setdefault(batch, width / batch)
            gap = abs(matrix["value"] - gram["value"]) / abs(gram["value"])
            rows.append(
                [
                    batch,
                    width,
                    f"{width / batch:g}",
                    seconds(matrix["seconds"]),
                    seconds(gram["seconds"]),
                    f"{ratio:.2f} x",
                    f"{matrix['memory'] / 1e6:.1f} MB",
                    f"{gram['memory'] / 1e6:.1f} MB",
                    f"{gap:.0e}",
                ]
            )
        head = [
            "B",
            "d",
            "d/B",
            "matrix",
            "gram",
            "gram is",
            "matrix +",
            "gram +",
            "values differ by",
        ]
        print(f"## {name}\n\n{table(head, rows)}\n")
        found = ", ".join(f"B={batch}: d/B >= {ratio:g}" for batch, ratio in sorted(wins.items()))
        print(f"The Gram form is the faster one from, on this grid: {found or 'nowhere'}.\n")


if __name__ == "__main__":
    main()
