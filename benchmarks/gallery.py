"""A large gallery of one class: IVF indexes against the exact search.

`IVF,Flat` compares a query with whole rows of the nearest lists; `IVF,PQ..x4fs,RFlat` with 4-bit
codes of them, and ranks the best of these by whole rows.

Three kinds of data; queries are fresh draws from the same law as the rows.

- `latent`: Gaussian in 16 dimensions, brought to `--dim` by a random linear map, with noise of a
  tenth of its length in all dimensions. Embeddings of a trained network have few intrinsic
  dimensions, and an IVF index lives on that.
- `clustered`: around random centres, about 100 rows each, with noise `--noise` times as long as the
  centre in all dimensions.
- `uniform`: directions without any structure, the worst case, in which no index finds the nearest
  much faster than a full search.

    python benchmarks/gallery.py [--rows 1000000 --dim 256] [--quick]
"""

from __future__ import annotations

import argparse
import time
from functools import partial

import torch
from _report import best_time, machine, seconds, set_threads, table
from torch import Tensor

from structkd import RetrievalGallery

PIECE = 65_536  # rows of one add()
LATENT = 16  # intrinsic dimensions


def draw(kind: str, rows: int, queries: int, dim: int, noise: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    total = torch.randn(rows + queries, dim, generator=generator)
    if kind == "clustered":
        centres = torch.randn(max(1, rows // 100), dim, generator=generator)
        total.mul_(noise)
        total += centres[torch.randint(len(centres), (len(total),), generator=generator)]
    if kind == "latent":
        basis = torch.randn(LATENT, dim, generator=generator) / LATENT**0.5
        total.mul_(0.1)
        total += torch.randn(len(total), LATENT, generator=generator) @ basis
    return total[:rows], total[rows:]


def parameters(index: str, nprobe: int, refine: int) -> str:
    if not nprobe:
        return ""
    return f"nprobe={nprobe}" + (f",k_factor_rf={refine}" if index.endswith("RFlat") else "")


def main() -> None:
    import faiss  # here, for torch has to come first

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--lists", type=int, default=0, help="0: twice the square root of the rows")
    parser.add_argument(
        "--index",
        nargs="+",
        default=["IVF{lists},Flat", "IVF{lists},PQ64x4fs,RFlat"],
        help="FAISS factory strings",
    )
    parser.add_argument("--refine", type=int, default=10, help="k_factor of RFlat")
    parser.add_argument("--nprobe", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--noise", type=float, default=1.0, help="of clusters, 1: as the centre")
    parser.add_argument("--kinds", nargs="+", default=["latent", "clustered", "uniform"])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="20,000 x 64")
    args = parser.parse_args()
    if args.quick:
        args.rows, args.dim, args.queries = 20_000, 64, 200
    set_threads(args.threads)
    lists = args.lists or round(2 * args.rows**0.5)
    rows = []
    for kind in args.kinds:
        vectors, queries = draw(kind, args.rows, args.queries, args.dim, args.noise)
        labels = torch.zeros(args.rows, dtype=torch.int64)
        exact_ids, exact_time = None, 0.0
        for index in ["Flat", *(text.format(lists=lists) for text in args.index)]:
            probes = [0] if index == "Flat" else args.nprobe
            gallery = RetrievalGallery(
                args.dim, index=index, parameters=parameters(index, probes[0], args.refine)
            )
            start = time.perf_counter()
            # In pieces: the index is trained on the first that suffice, and memory stays low.
            for part in range(0, args.rows, PIECE):
                gallery.add(vectors[part : part + PIECE], labels[part : part + PIECE])
            build = time.perf_counter() - start
            for nprobe in probes:
                if nprobe:
                    # The one index at several settings: training it again takes minutes.
                    faiss.ParameterSpace().set_index_parameters(
                        gallery._classes[0].index, parameters(index, nprobe, args.refine)
                    )
                search = partial(gallery.search, queries, labels[: args.queries])
                ids = search()[1][:, 0]
                # The exact search of a large gallery takes seconds: it is timed once.
                slow = not nprobe and args.rows >= 200_000
                spent = best_time(search, 1 if slow else args.repeat)
                if exact_ids is None:
                    exact_ids, exact_time = ids, spent
                recall = float((ids == exact_ids).float().mean())
                rows.append(
                    [
                        kind,
                        index if not nprobe else f"{index}, nprobe={nprobe}",
                        seconds(build),
                        seconds(spent),
                        f"{exact_time / spent:.1f} x",
                        f"{recall:.3f}",
                    ]
                )
            del gallery
    print(f"{machine()}\n")
    print(f"{args.rows} rows x {args.dim}, {args.queries} queries, cosine\n")
    print(table(["data", "index", "train and add", "search", "speed", "recall@1"], rows))


if __name__ == "__main__":
    main()
