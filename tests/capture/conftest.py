"""Every capture is tried on each device: networks and images are made there by default."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.devices import DEVICES


@pytest.fixture(autouse=True, params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "cpu":
        yield request.param
        return
    torch.set_default_device(request.param)
    try:  # the same numbers at every call, in all digits
        with torch.backends.cudnn.flags(deterministic=True, allow_tf32=False):
            yield request.param
    finally:
        torch.set_default_device(None)
