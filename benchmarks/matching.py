"""Dynamic re-matching: the gallery against the published per-sample loop.

Logits are drawn by class: a common peak at the class and Gaussian noise, teachers sharper than
students. The loop takes one student at a time and one teacher of its class at a time, and keeps the
least KL divergence at temperature 3. A second peer, which the paper's code does not have, takes one
student at a time and all teachers of its class at once.

    python benchmarks/matching.py [--students 20000 --teachers 20000 --classes 10] [--quick]
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from _report import best_time, machine, seconds, set_threads, table
from torch import Tensor

from structkd import LagrangianPlanner, RetrievalGallery, SemBridgeMatcher

TEMPERATURE = 3.0
LIMIT = 120.0  # seconds that a loop may take before it is extrapolated
MEASURED = 20.0  # seconds of it that are measured then


def draw(count: int, classes: int, peak: float, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    logits = 2 * torch.randn(count, classes, generator=generator)
    return logits + peak * F.one_hot(labels, classes), labels


def pair_loop(students: Tensor, student_labels: Tensor, teachers: Tensor, pools: dict) -> Tensor:
    """Student by student, teacher by teacher."""
    chosen = []
    for student, label in zip(students, student_labels.tolist(), strict=True):
        log_q = F.log_softmax(student / TEMPERATURE, dim=0)
        best, best_distance = -1, float("inf")
        for position in pools[label]:
            p = F.softmax(teachers[position] / TEMPERATURE, dim=0)
            distance = F.kl_div(log_q, p, reduction="sum").item()
            if distance < best_distance:
                best, best_distance = position, distance
        chosen.append(best)
    return torch.tensor(chosen)


def row_loop(students: Tensor, student_labels: Tensor, teachers: Tensor, pools: dict) -> Tensor:
    """Student by student, against all teachers of the class."""
    chosen = []
    for student, label in zip(students, student_labels.tolist(), strict=True):
        pool = torch.tensor(pools[label])
        log_q = F.log_softmax(student / TEMPERATURE, dim=0)
        p = F.softmax(teachers[pool] / TEMPERATURE, dim=1)
        distance = F.kl_div(log_q.expand_as(p), p, reduction="none").sum(dim=1)
        chosen.append(int(pool[distance.argmin()]))
    return torch.tensor(chosen)


def differing(found: Tensor, expected: Tensor, students: Tensor, teachers: Tensor) -> int:
    """Counts matches that are worse or better than the peer's by more than float64 rounding."""
    log_q = F.log_softmax(students.double() / TEMPERATURE, dim=1)
    distances = []
    for ids in (found, expected):
        log_p = F.log_softmax(teachers[ids].double() / TEMPERATURE, dim=1)
        distances.append((log_p.exp() * (log_p - log_q)).sum(dim=1))
    return int(((distances[0] - distances[1]).abs() > 1e-12).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--students", type=int, default=20_000)
    parser.add_argument("--teachers", type=int, default=20_000)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--subset", type=int, default=40, help="students a slow loop is timed on")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="500 x 500")
    args = parser.parse_args()
    if args.quick:
        args.students = args.teachers = 500
    set_threads(args.threads)
    # In float64: what the loop compares then differs from the exact values by rounding only.
    teachers, teacher_labels = draw(args.teachers, args.classes, 8.0, seed=0)
    students, student_labels = draw(args.students, args.classes, 4.0, seed=1)
    shuffle = torch.randperm(args.students, generator=torch.Generator().manual_seed(2))
    students, student_labels = students[shuffle], student_labels[shuffle]
    pools: dict[int, list[int]] = {}
    for position, label in enumerate(teacher_labels.tolist()):
        pools.setdefault(label, []).append(position)

    def rematch() -> Tensor:
        gallery = RetrievalGallery(args.classes, metric="kl", temperature=TEMPERATURE)
        gallery.add(teachers, teacher_labels)
        return SemBridgeMatcher(gallery).match(students, student_labels).ids

    ids = rematch()
    ours = best_time(rematch, args.repeat)
    gallery = RetrievalGallery(args.classes, metric="kl", temperature=TEMPERATURE)
    gallery.add(teachers, teacher_labels)
    matcher = SemBridgeMatcher(gallery)
    search = best_time(lambda: matcher.match(students, student_labels), args.repeat)

    rows = [
        ["build the gallery and match", args.students, seconds(ours), "1", ""],
        [
            "match, gallery kept",
            args.students,
            seconds(search),
            f"{ours / search:.2f} x faster",
            "",
        ],
    ]
    for name, loop in (
        ("published loop: student by student, teacher by teacher", pair_loop),
        ("half vectorised: student by student", row_loop),
    ):
        loop(students[:2].double(), student_labels[:2], teachers.double(), pools)
        count, spent, expected = 0, 0.0, torch.empty(0, dtype=torch.int64)
        # To the end if that takes no longer than the limit, else on a subset.
        while count < args.students and (spent < MEASURED or spent / count * args.students < LIMIT):
            part = slice(count, count + args.subset)
            start = time.perf_counter()
            more = loop(students[part].double(), student_labels[part], teachers.double(), pools)
            spent += time.perf_counter() - start
            expected = torch.cat([expected, more])
            count = len(expected)
        total = spent / count * args.students
        wrong = differing(ids[:count], expected, students[:count], teachers)
        same = int((ids[:count] == expected).sum())
        size = f"{count}" if count == args.students else f"{count} (extrapolated)"
        rows.append(
            [
                name,
                size,
                seconds(total),
                f"{total / ours:.0f} x slower",
                f"{same} same, {wrong} differ",
            ]
        )

    planner = LagrangianPlanner(0.05, "capacity")
    planned = SemBridgeMatcher(gallery, planner)
    start = time.perf_counter()
    match = planned.match(students, student_labels)
    spent = time.perf_counter() - start
    nearest = matcher.match(students, student_labels)
    rows.append(
        ["planned by capacity 2 (another result)", args.students, seconds(spent),
         f"{spent / ours:.1f} x slower", ""]
    )  # fmt: skip

    print(f"{machine()}\n")
    print(f"{args.students} students x {args.teachers} teachers in {args.classes} classes\n")
    print(table(["", "students timed", "time for all", "against ours", "matches"], rows))
    print()
    head = ["", "teachers in use", "most students a teacher", "mean KL"]
    use = []
    for name, result in (("nearest", nearest), ("planned", match)):
        served = result.ids.bincount()
        mean = f"{-float(result.scores.mean()):.4f}"
        use.append([name, int((served > 0).sum()), int(served.max()), mean])
    print(table(head, use))


if __name__ == "__main__":
    main()
