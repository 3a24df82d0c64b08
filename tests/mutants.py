"""Does a test notice every changed sign and factor of the criteria? ``python tests/mutants.py``.

Each mutant is one change of one file of ``structkd/criteria``: a sign or an operator turned, a mean
made a sum, a number doubled. The tests of that file run on it, then the contract's definitions, and
one must fail. What survives is listed with its line; ``--every 5`` tries every fifth change,
``logits maps`` these files alone.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import io
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
CRITERIA = ROOT / "structkd" / "criteria"
TESTS = {
    "_maps": ["maps", "regression"],
    "coral": ["dskd"],
    "correlation": ["dskd", "dense"],
    "logits": ["logits", "temperature", "pixels"],
    "maps": ["maps", "pixels"],
    "moments": ["dense", "regression", "pixels"],
    "numerics": ["dense", "dskd", "logits"],
    "structure": ["dskd"],
    "supervision": ["pixels", "dskd"],
    "uniformity": ["dskd"],
}
"""Tests of a file whose tests have other names."""

DEFINITION = "test_value_and_gradient_equal_the_definition"  # of the contract, every criterion
PLUMBING = ("__init__", "base")  # no arithmetic of a criterion
_LONGEST = 180  # seconds; a mutant that never ends is noticed
_TURNED = {ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.Pow: "*"}
_SIGNS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.Pow: "**"}
_REDUCED = {"mean": "sum", "sum": "mean", "amax": "amin", "logsumexp": "sum"}
_UNTOUCHED = (ast.Raise, ast.JoinedStr, ast.Assert, ast.AnnAssign, ast.arguments)


class Mutant(NamedTuple):
    line: int
    change: str
    source: str


def mutants(source: str) -> Iterator[Mutant]:
    """Every change of the arithmetic inside a file's functions."""
    starts = [0]
    for text in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(text.encode()))
    raw = source.encode()

    def at(line: int, column: int) -> int:
        return starts[line - 1] + column

    def changed(begin: int, end: int, text: str, line: int) -> Mutant:
        told = f"{raw[begin:end].decode()} -> {text or 'nothing'}"
        return Mutant(line, told, (raw[:begin] + text.encode() + raw[end:]).decode())

    for node in _arithmetic(ast.parse(source)):
        line = getattr(node, "lineno", 0)  # operators and contexts have none
        match node:
            case ast.BinOp(left, op, right) if type(op) in _TURNED:
                gap = at(left.end_lineno, left.end_col_offset)
                sign = _SIGNS[type(op)].encode()
                begin = raw.index(sign, gap, at(right.lineno, right.col_offset))
                yield changed(begin, begin + len(sign), _TURNED[type(op)], line)
            case ast.UnaryOp(ast.USub(), ast.expr()) if not isinstance(node.operand, ast.Constant):
                begin = at(line, node.col_offset)
                yield changed(begin, begin + 1, "", line)
            # A sum over processes is no arithmetic, and these tests run in one.
            case ast.Call(ast.Attribute(ast.Name("shards"))):
                continue
            case ast.Call(ast.Attribute(attr=name)) if name in _REDUCED:
                end = at(node.func.end_lineno, node.func.end_col_offset)
                yield changed(end - len(name), end, _REDUCED[name], line)
            case ast.Constant(float(value)) if value:
                begin = at(line, node.col_offset)
                yield changed(begin, at(line, node.end_col_offset), repr(2 * value), line)


def _arithmetic(tree: ast.AST, inside: bool = False) -> Iterator[Any]:
    """The nodes of functions' bodies, without messages, defaults and annotations."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, _UNTOUCHED):
            continue
        within = inside or isinstance(node, ast.FunctionDef)
        if inside:
            yield node
        yield from _arithmetic(node, within)


class _Mutated(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from another source."""

    def __init__(self, name: str, file: Path, source: str) -> None:
        self.name, self.file, self.source = name, file, source

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.name:
            return None
        return importlib.machinery.ModuleSpec(name, self, origin=str(self.file))

    def exec_module(self, module: Any) -> None:
        module.__file__ = str(self.file)
        exec(compile(self.source, str(self.file), "exec"), module.__dict__)


def survives(stem: str, source: str) -> bool:
    """Whether the file's tests all pass, in a process of their own."""
    files = [f"tests/criteria/test_{name}.py" for name in TESTS.get(stem, [stem])]
    files.append(f"tests/criteria/test_contract.py::{DEFINITION}")
    child = os.fork()
    if not child:
        import pytest

        name = f"structkd.criteria.{stem}"
        sys.meta_path.insert(0, _Mutated(name, CRITERIA / f"{stem}.py", source))
        options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not slow"]
        code = 1
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(BaseException):
            code = int(pytest.main([*files, *options]))
        os._exit(code)
    end = time.monotonic() + _LONGEST
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def main() -> int:
    """0 where a test notices every mutant, else 1."""
    stems = sorted(file.stem for file in CRITERIA.glob("*.py") if file.stem not in PLUMBING)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", help="of structkd/criteria, without .py; all of them")
    parser.add_argument("--every", type=int, default=1, help="try every n-th change alone")
    options = parser.parse_args()
    if unknown := set(options.files) - set(stems):
        parser.error(f"unknown {', '.join(sorted(unknown))}; known: {', '.join(stems)}")
    os.chdir(ROOT)
    import hypothesis  # noqa: F401  imported once, before the processes part
    import pytest  # noqa: F401
    import torch

    torch.set_num_threads(1)
    tried, survived = 0, []
    for stem in options.files or stems:
        source = (CRITERIA / f"{stem}.py").read_text()
        if not survives(stem, source):
            print(f"{stem}: its tests fail as it is; fix them first", file=sys.stderr)
            return 1
        for mutant in list(mutants(source))[:: options.every]:
            tried += 1
            if survives(stem, mutant.source):
                survived.append(f"{stem}.py:{mutant.line}: {mutant.change}")
                print(survived[-1], flush=True)
    print(f"{tried} mutants, {len(survived)} survived")
    return bool(survived)


if __name__ == "__main__":
    sys.exit(main())
