"""What is no criterion, beside its peers: re-matching, plans, a gallery, the import."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from structkd import LagrangianPlanner, RetrievalGallery, SemBridgeMatcher

TEMPERATURE = 3.0


def measured() -> dict[str, Mapping[str, Any]]:
    """Returns each operation's row: its seconds, its peer's, their ratio and what was compared."""
    rows: dict[str, Mapping[str, Any]] = {}
    for name, function in (
        ("re-matching of 20,000 among 20,000", matching),
        ("Sinkhorn plan, 64 of 128 x 128", plans),
        ("Sinkhorn plan of points, 64 of 128 x 128", clouds),
        ("gallery of 100,000 x 256, IVF and 4-bit codes", gallery),
        ("import structkd", imported),
    ):
        try:
            rows[name] = function()
        except ImportError as error:
            print(f"not installed: {error.name} (beside {name})")
    return rows


def _timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


def _in_turns(ours: Callable[[], Any], peer: Callable[[], Any]) -> dict[str, float]:
    turns = [(_timed(ours)[0], _timed(peer)[0]) for _ in range(3)]
    own, spent = (statistics.median(times) for times in zip(*turns, strict=True))
    return {"seconds": own, "peer_seconds": spent, "ratio": spent / own}


def matching(count: int = 20_000, classes: int = 10, subset: int = 60) -> dict[str, Any]:
    """The published loop takes one student and one teacher of its class at a time, a subset here.

    Its time is a product of counts, so that of the subset is scaled to all students.
    """

    def draw(peak: float, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randperm(count, generator=generator) % classes
        logits = 2 * torch.randn(count, classes, generator=generator)
        return logits + peak * F.one_hot(labels, classes), labels

    teachers, labels_t = draw(8.0, 0)
    students, labels_s = draw(4.0, 1)

    def rematch() -> Tensor:
        gallery = RetrievalGallery(classes, metric="kl", temperature=TEMPERATURE)
        gallery.add(teachers, labels_t)
        return SemBridgeMatcher(gallery).match(students, labels_s).ids

    def loop() -> Tensor:
        chosen = []
        for student, label in zip(students[:subset].double(), labels_s.tolist(), strict=False):
            log_q = F.log_softmax(student / TEMPERATURE, dim=0)
            pool = (labels_t == label).nonzero().flatten().tolist()
            found = []
            for place in pool:
                p = F.softmax(teachers[place].double() / TEMPERATURE, dim=0)
                found.append(F.kl_div(log_q, p, reduction="sum").item())
            chosen.append(pool[min(range(len(found)), key=found.__getitem__)])
        return torch.tensor(chosen)

    rematch()
    own, ids = min((_timed(rematch) for _ in range(3)), key=lambda pair: pair[0])
    spent, expected = _timed(loop)
    spent *= count / subset
    same = f"{int((ids[:subset] == expected).sum())} of {subset} matches the same"
    return {
        "peer": f"published loop, {subset} students timed",
        "seconds": own,
        "peer_seconds": spent,
        "ratio": spent / own,
        "compared": same,
    }


def plans(batch: int = 64, size: int = 128, epsilon: float = 0.1) -> dict[str, Any]:
    """Both marginals: POT solves one cost after the other."""
    import ot

    cost = torch.rand(batch, size, size, generator=torch.Generator().manual_seed(0))
    mass = torch.full((size,), 1 / size)
    planner = LagrangianPlanner(epsilon, "both", gradient="none", tolerance=1e-4)
    row = torch.full((batch, size), 1 / size)

    def ours() -> Tensor:
        return planner(cost, row_mass=row, column_mass=row).plan

    def pot() -> Tensor:
        return torch.stack(
            [ot.sinkhorn(mass, mass, c, epsilon, method="sinkhorn_log", stopThr=1e-4) for c in cost]
        )

    gap = float((ours() - pot()).abs().sum(dim=(1, 2)).max())
    return {
        "peer": "POT, one by one",
        **_in_turns(ours, pot),
        "compared": f"plans differ by {gap:.0e}",
    }


def clouds(batch: int = 64, size: int = 128, epsilon: float = 0.1) -> dict[str, Any]:
    """Both start from points. geomloss anneals in a fixed number of steps, here about a hundred.

    It stops there whatever the masses, so that its plan is the less exact one.
    """
    from geomloss import SamplesLoss

    points = torch.rand(2, batch, size, 8, generator=torch.Generator().manual_seed(0))
    mass = torch.full((batch, size), 1 / size)
    planner = LagrangianPlanner(epsilon, "both", gradient="none", tolerance=1e-4)
    options = {"p": 2, "blur": epsilon**0.5, "scaling": 0.95, "backend": "tensorized"}
    potentials = SamplesLoss("sinkhorn", debias=False, potentials=True, **options)

    def cost() -> Tensor:
        exact = "donot_use_mm_for_euclid_dist"
        return torch.cdist(*points, compute_mode=exact).square() / 2

    def ours() -> Tensor:
        return planner(cost(), row_mass=mass, column_mass=mass).plan

    def geomloss() -> Tensor:
        first, second = potentials(mass, points[0], mass, points[1])
        return ((first[:, :, None] + second[:, None] - cost()) / epsilon).exp() / size**2

    misses = [float((p().sum(dim=1) - mass).abs().sum(dim=1).max()) for p in (ours, geomloss)]
    return {
        "peer": "geomloss",
        **_in_turns(ours, geomloss),
        "compared": f"columns miss their mass by {misses[0]:.0e} and {misses[1]:.0e}",
    }


def gallery(rows: int = 100_000, width: int = 256, queries: int = 500) -> dict[str, Any]:
    """Embeddings of 16 intrinsic dimensions with noise: the exact search is the peer."""
    import faiss  # after torch

    faiss.omp_set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(16, width, generator=generator) / 4
    latent = torch.randn(rows + queries, 16, generator=generator)
    data = latent @ basis + 0.1 * torch.randn(rows + queries, width, generator=generator)
    labels = torch.zeros(rows + queries, dtype=torch.int64)
    found = {}
    for index, parameters in (
        ("Flat", ""),
        ("IVF632,PQ64x4fs,RFlat", "nprobe=32,k_factor_rf=10"),
    ):
        held = RetrievalGallery(width, index=index, parameters=parameters)
        held.add(data[:rows], labels[:rows])

        def search(held: RetrievalGallery = held) -> Any:
            return held.search(data[rows:], labels[rows:])[1][:, 0]

        search()
        found[index] = min((_timed(search) for _ in range(3)), key=lambda pair: pair[0])
    (exact, wanted), (own, ids) = found.values()
    return {
        "peer": "exact search",
        "seconds": own,
        "peer_seconds": exact,
        "ratio": exact / own,
        "compared": f"recall {float((ids == wanted).float().mean()):.3f}",
    }


def flat_gallery(rows: int, device: str, width: int = 256, queries: int = 1000) -> dict[str, Any]:
    """An exact search on a device; the first of its answers are compared with the CPU's scores."""
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(rows, width, generator=generator)
    asked = torch.randn(queries, width, generator=generator)
    labels, wanted = torch.zeros(rows, dtype=torch.int64), torch.zeros(queries, dtype=torch.int64)
    held = RetrievalGallery(width, device=device)
    for part in range(0, rows, 1 << 16):
        held.add(data[part : part + (1 << 16)], labels[part : part + (1 << 16)])
    given = asked.to(device), wanted.to(device)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        ids = held.search(*given)[1][:, 0].cpu()  # waits for the device
        times.append(time.perf_counter() - start)
    few = 20
    scores = F.normalize(asked[:few]) @ F.normalize(data).T
    return {
        "rows": rows,
        "width": width,
        "queries": queries,
        "seconds": min(times[1:]),  # the first builds the index
        "moves": data.nbytes,  # every row is read at least once
        "same_as_the_cpu": int((ids[:few] == scores.argmax(1)).sum()),
        "compared": few,
    }


def imported(turns: int = 4) -> dict[str, Any]:
    """In fresh processes that take turns; the first turn reads the files from the disk."""
    times: dict[str, list[float]] = {"import torch": [], "import torch, structkd": []}
    for _ in range(turns):
        for statement, spent in times.items():
            code = (
                f"import time; t = time.process_time(); {statement}; print(time.process_time() - t)"
            )
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
            spent.append(float(done.stdout))
    alone, both = (min(spent[1:]) for spent in times.values())
    return {"peer": "import torch", "seconds": both, "peer_seconds": alone, "ratio": alone / both}
