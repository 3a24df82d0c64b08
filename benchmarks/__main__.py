"""Every criterion beside its peers in one run: time, memory, growth; see benchmarks/README.md.

python -m benchmarks                         # prints the table, writes the JSON file
python -m benchmarks --write                 # and puts table and figure into docs/
python -m benchmarks --check                 # exits 1 where a row falls short
python -m benchmarks --only KDLoss --compile
python -m benchmarks --only gallery --gallery 1000000 --device cuda
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks import operations
from benchmarks.peers import AXES, SIZES, Case, cases, features, inputs

DOCS = Path(__file__).parents[1] / "docs"
LEAST = 0.9  # of a peer's speed
# What a criterion's checks of its inputs may cost at any size, in seconds: no step notices it.
ALLOWED = 5e-4
MARKS = "<!-- speed:begin -->", "<!-- speed:end -->"


def main() -> int:
    args = _arguments()
    torch.set_num_threads(args.threads)
    # Convolutions alone would round to TF32, and answers that should be the same would differ.
    torch.backends.cudnn.allow_tf32 = False
    warnings.filterwarnings("ignore", category=UserWarning)
    found: dict[str, Any] = {
        "machine": machine(args),
        "device": args.device,
        "copy_bytes_a_second": copied(args.device),
        "rows": [],
        "missing": {},
    }
    for name, case in cases().items():
        if not args.only or any(word.lower() in name.lower() for word in args.only):
            criterion_rows(name, case, args, found)
            if args.json:  # what is done is kept
                args.json.write_text(json.dumps(found, indent=1) + "\n")
    if not args.only and not args.quick and args.device == "cpu":
        found["operations"] = operations.measured()
    if args.gallery:
        flat = operations.flat_gallery(args.gallery, args.device)
        found["gallery"] = flat | share_of_copying(flat["moves"], flat["seconds"], found)
    for package, names in found["missing"].items():
        print(f"not installed: {package} (beside {', '.join(names)})")
    text = f"{found['machine']}\n\n{table(found)}"
    print(text)
    if args.gallery:
        print(gallery_line(found["gallery"]))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    if args.write:
        page = DOCS / "speed.md"
        start, end = MARKS
        old = page.read_text()
        pattern = re.compile(f"{start}.*?{end}", re.DOTALL)
        page.write_text(pattern.sub(lambda _: f"{start}\n{text}\n{end}", old))
        figure(found, DOCS / "figures" / "speed.png")
    wrong = list(shortfalls(found))
    for line in wrong:
        print(line)
    return int(args.check and bool(wrong))


def shortfalls(found: Mapping[str, Any]) -> Iterator[str]:
    """Yields a line for whatever ``--check`` does not let pass."""
    for row in found["rows"]:
        place = f"{row['criterion']} {row['size']}"
        if row["short"]:
            yield f"short: {place} beside {row['peer']}: {row['ratio']:.2f} x"
        if row.get("off"):
            yield f"answers differ: {place} beside {row['peer']}"
    for place, said in {
        f"{row['criterion']} {row['size']}": row["waits"] for row in found["rows"] if row["waits"]
    }.items():
        yield f"waits for the device: {place}: {said}"
    gallery = found.get("gallery", {"same_as_the_cpu": 0, "compared": 0})
    if gallery["same_as_the_cpu"] < gallery["compared"]:
        yield "answers differ: the gallery beside the CPU"


def criterion_rows(name: str, case: Case, args: argparse.Namespace, found: dict[str, Any]) -> None:
    """Adds a row for every size and peer of a criterion; one without a peer has one row a size."""
    sizes = case.sizes
    if args.quick:
        sizes = {"small": next(iter(sizes.values()))}
    for label, size in sizes.items():
        given = inputs(case.kind, size, args.device, args.dtype, args.channels_last)
        criterion = case.make().to(args.device)
        ours = _ours(criterion, case.kind, given)
        calls, peers = [_step(ours, given, criterion)], []
        wanted = _answer(calls[0], given)
        for peer, (make, tolerance) in case.peers.items():
            try:
                loss = make(criterion)
            except ImportError as error:
                names = found["missing"].setdefault(str(error.name).split(".")[0], [])
                names += [name] if name not in names else []
                continue
            call = _step(partial(loss, *given), given, criterion)
            gap = _gap(wanted, _answer(call, given))
            calls.append(call)
            peers.append((peer, tolerance, gap))
        times = interleaved(calls, args.seconds)
        tell = label == "usual" or len(sizes) == 1
        memory = [peak_memory(call, args.device) if tell else 0 for call in calls]
        own = statistics.median(times[0])
        row = {
            "criterion": name,
            "size": label,
            "shape": dict(zip(AXES[case.kind], size, strict=True)),
            "seconds": own,
            "bytes": memory[0],
            "moves": _bytes(given),
            **share_of_copying(_bytes(given), own, found),
            "waits": _waits(calls[0], args.device),
            "peer": None,
            "short": False,
        }
        if label == "usual":
            row["growth"] = growth(case, size, own, args)
            if args.compile:
                row["compile"] = compiled(case, criterion, given, own, args)
        if not peers:
            found["rows"].append(row)
        for (peer, tolerance, gap), spent, held in zip(peers, times[1:], memory[1:], strict=True):
            ratio = statistics.median(p / o for p, o in zip(spent, times[0], strict=True))
            beside = statistics.median(spent)
            beside_row = {
                **row,
                "peer": peer,
                "peer_seconds": beside,
                "peer_bytes": held,
                "ratio": ratio,
                "answers_differ_by": gap,
                "off": tolerance is not None and args.dtype is torch.float32 and gap > tolerance,
                "short": ratio < LEAST and min(times[0]) - min(spent) > ALLOWED,
            }
            found["rows"].append(beside_row)
        done = ", ".join(
            f"{r['ratio']:.2f} x {r['peer']}" for r in found["rows"][-len(peers) :] if peers
        )
        print(f"{name} {label}: {own * 1e3:.3g} ms, {done or 'no peer'}", file=sys.stderr)


def _ours(criterion: nn.Module, kind: str, given: tuple[Any, ...]) -> Callable[[], Tensor]:
    student, teacher, target = given
    reads_target = kind in ("logits", "pixels")
    pair = features(kind, student), features(kind, teacher)  # what networks give

    def loss() -> Tensor:
        value: Tensor = criterion(*pair, target if reads_target else None)
        return value

    return loss


def _leaves(given: tuple[Any, ...]) -> list[Tensor]:
    student = given[0]
    return [student] if isinstance(student, Tensor) else list(student)


def _step(
    loss: Callable[[], Tensor], given: tuple[Any, ...], criterion: nn.Module
) -> Callable[[], Tensor]:
    """Returns a forward and a backward pass, with the parameters' gradients."""

    def call() -> Tensor:
        for leaf in _leaves(given):
            leaf.grad = None
        for parameter in criterion.parameters():
            parameter.grad = None
        value = loss()
        value.backward()
        return value

    return call


def _answer(call: Callable[[], Tensor], given: tuple[Any, ...]) -> list[Tensor]:
    value = call().detach().double().reshape(1)
    grads = [leaf.grad for leaf in _leaves(given) if leaf.grad is not None]
    return [value, *(grad.double().flatten() for grad in grads)]


def _gap(first: list[Tensor], second: list[Tensor]) -> float:
    """Returns how far value and gradient are apart, as a share of their own size."""
    shares = [
        (a - b).norm() / b.norm().clamp_min(1e-12) for a, b in zip(first, second, strict=True)
    ]
    return float(max(shares))


def interleaved(calls: Sequence[Callable[[], object]], seconds: float) -> list[list[float]]:
    """Times calls in turns until ``seconds`` each are spent, 5 turns at least."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    begin = clock()
    while len(times[0]) < 5 or (clock() - begin < seconds * len(calls) and len(times[0]) < 300):
        for call, spent in zip(calls, times, strict=True):
            start = clock()
            call()
            spent.append(clock() - start)
    return times


def clock() -> float:
    """Returns the process's own seconds, which the load of others counts in least, or the GPU's."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def peak_memory(call: Callable[[], object], device: str) -> int:
    """Returns the most bytes of tensors that a call holds at once, beside what it was given."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    events = record.profiler.kineto_results.events()
    moves = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = most = 0
    for _, size in moves:
        held += size
        most = max(most, held)
    return most


def growth(
    case: Case, size: tuple[int, ...], seconds: float, args: argparse.Namespace
) -> dict[str, float]:
    """Returns the power with which time grows along each axis, from twice the usual size."""
    powers = {}
    for axis in dict.fromkeys(name[0] for name in AXES[case.kind]):
        twice = tuple(
            2 * value if name[0] == axis else value
            for name, value in zip(AXES[case.kind], size, strict=True)
        )
        given = inputs(case.kind, twice, args.device, args.dtype, args.channels_last)
        criterion = case.make().to(args.device)
        call = _step(_ours(criterion, case.kind, given), given, criterion)
        ((*times,),) = interleaved([call], args.seconds / 4)
        power = math.log2(statistics.median(times) / seconds)
        powers["HW" if axis == "H" else axis] = round(power / (2 if axis == "H" else 1), 2)
    return powers


def compiled(
    case: Case, criterion: nn.Module, given: tuple[Any, ...], own: float, args: argparse.Namespace
) -> dict[str, Any]:
    """Counts graph breaks, and graphs over two batch sizes, and times the compiled criterion."""
    import torch._dynamo as dynamo

    dynamo.reset()
    try:
        explained = dynamo.explain(_ours(criterion, case.kind, given))()
        dynamo.reset()
        dynamo.utils.counters.clear()
        fast = torch.compile(criterion)
        call = _step(_ours(fast, case.kind, given), given, criterion)
        (times,) = interleaved([call], args.seconds)
        size = SIZES[case.kind]["usual"]
        for batch in (size[0] // 2, size[0] // 4):
            other = inputs(case.kind, (batch, *size[1:]), args.device, args.dtype, False)
            _step(_ours(fast, case.kind, other), other, criterion)()
        graphs = dynamo.utils.counters["stats"]["unique_graphs"]
    except Exception as error:  # whatever the compiler says of a criterion is its row
        return {"error": f"{type(error).__name__}: {str(error)[:200]}"}
    return {
        "graph_breaks": explained.graph_break_count,
        "graphs_of_three_batch_sizes": graphs,
        "ratio_to_eager": own / statistics.median(times),
    }


def _waits(call: Callable[[], object], device: str) -> str:
    """Returns what a call says that waits for the GPU, "" where nothing does."""
    if device != "cuda":
        return ""
    call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        return str(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def _bytes(given: tuple[Any, ...]) -> int:
    """Returns what must move at the least: both sides read, the student's gradient written."""
    teacher = [given[1]] if isinstance(given[1], Tensor) else given[1]
    return sum(t.nbytes for t in [*teacher, *_leaves(given), *_leaves(given)])


def share_of_copying(least: int, seconds: float, found: Mapping[str, Any]) -> dict[str, float]:
    """Returns how fast the bytes move that must, and what share that is of a copy's speed."""
    speed = least / seconds
    return {"bytes_a_second": speed, "of_copy_speed": speed / found["copy_bytes_a_second"]}


def copied(device: str) -> float:
    """Returns the bytes a second, read and written, of a copy that no cache holds."""
    source = torch.ones((256 if device == "cuda" else 16) * 2**20, device=device)
    target = torch.empty_like(source)
    (times,) = interleaved([lambda: target.copy_(source)], 0.2)
    return 2 * source.nbytes / statistics.median(times)


def machine(args: argparse.Namespace) -> str:
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(ln.split(":")[1].strip() for ln in lines if ln.startswith("model name"))
    if args.device == "cuda":
        card = torch.cuda.get_device_properties()
        cuda = f"{card.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
        model = f"{card.name}, {cuda}; {model}"
    layout = ", channels last" if args.channels_last else ""
    return (
        f"{model}, {os.cpu_count()} cores, {args.threads} thread(s), {args.dtype}{layout}; "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def gallery_line(row: Mapping[str, Any]) -> str:
    return (
        f"{row['queries']:,} queries among {row['rows']:,} rows of {row['width']}: "
        f"{row['seconds'] * 1e3:.3g} ms, {row['of_copy_speed']:.0%} of a copy's speed, "
        f"{row['same_as_the_cpu']} of {row['compared']} nearest as on the CPU"
    )


def table(found: Mapping[str, Any]) -> str:
    """Returns a row for each criterion and peer: ratios of time (bold: short) and of memory.

    On a card also the share of its copying speed at which the bytes move that must.
    """
    card = found["device"] != "cpu"
    lines = [
        "| criterion | peer | small | usual | large | ms, usual | memory |",
        "|---|---|---|---|---|---|---|",
    ]
    if card:
        lines = [lines[0] + " of a copy's speed, largest |", lines[1] + "---|"]

    def said(row: Mapping[str, Any]) -> str:
        return f"**{row['ratio']:.2g} x**" if row["short"] else f"{row['ratio']:.2g} x"

    rows = [row for row in found["rows"] if row["peer"]]
    for key in dict.fromkeys((row["criterion"], row["peer"]) for row in rows):
        sizes = {row["size"]: row for row in rows if (row["criterion"], row["peer"]) == key}
        first = sizes.get("usual") or next(iter(sizes.values()))
        three = [said(sizes[s]) if s in sizes else "" for s in SIZES["rows"]]
        more = [f"{s} {said(r)}" for s, r in sizes.items() if s not in SIZES["rows"]]
        memory = f"{first['peer_bytes'] / max(first['bytes'], 1):.2g} x"
        cells = [key[0], key[1] + (f" ({'; '.join(more)})" if more else ""), *three]
        cells += [f"{first['seconds'] * 1e3:.2g}", memory]
        if card:
            cells.append(f"{list(sizes.values())[-1]['of_copy_speed']:.0%}")
        lines.append("| " + " | ".join(cells) + " |")
    for name, row in found.get("operations", {}).items():
        ratio = f"{row['ratio']:.3g} x"
        lines.append(f"| {name} | {row['peer']} | | {ratio} | | {row['seconds'] * 1e3:.2g} | |")
    return "\n".join(lines)


def figure(found: Mapping[str, Any], path: Path) -> None:
    """Draws the ratio to every peer at the usual and the large size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in found["rows"] if row["peer"] and row["size"] != "small"]
    names = list(dict.fromkeys(f"{row['criterion']} : {row['peer']}" for row in rows))[::-1]
    _, axes = plt.subplots(figsize=(8, 0.24 * len(names) + 1), layout="constrained")
    for size, colour in (("usual", "tab:blue"), ("large", "tab:orange"), ("", "0.6")):
        for row in rows:
            if row["size"] == size or (not size and row["size"] not in SIZES["rows"]):
                place = names.index(f"{row['criterion']} : {row['peer']}")
                axes.plot(row["ratio"], place, "o", color=colour, markersize=5)
        axes.plot([], [], "o", color=colour, label=size or "other shapes")
    axes.axvline(1, color="0.3", linewidth=0.8)
    axes.axvline(LEAST, color="tab:red", linewidth=0.8, linestyle=":")
    axes.set(
        xscale="log",
        xlabel="times as fast as the peer, forward and backward",
        ylim=(-1, len(names)),
    )
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.legend(fontsize=7)
    plt.savefig(path, dpi=110)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--only", nargs="+", help="words that a criterion's name has one of")
    parser.add_argument("--quick", action="store_true", help="smallest size only: does it work?")
    parser.add_argument("--seconds", type=float, default=0.4, help="for each call of each row")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", action="store_true", help="graph breaks, recompiles and time")
    parser.add_argument("--gallery", type=int, default=0, help="a flat gallery of so many rows too")
    parser.add_argument("--check", action="store_true", help="exit 1 where a row falls short")
    parser.add_argument("--write", action="store_true", help="table and figure into docs/")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    args.dtype = getattr(torch, args.dtype)
    if args.write and args.json is None:
        args.json = DOCS / "results" / "speed.json"
    return args


if __name__ == "__main__":
    sys.exit(main())
