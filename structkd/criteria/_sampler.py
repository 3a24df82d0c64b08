"""Draws from one random generator whose state is saved, copied and moved with its owner."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

# Of a packed state: a CPU's generator has 5,056 bytes, a GPU's some dozens.
BYTES = 8192


class Sampler:
    """Draws whole numbers, independent of torch's global seed.

    The generator lives on the device of the draws, so that nothing is copied there. Generators of
    two kinds of device have different states: one that moves to another kind starts there from the
    seed, unless a state of that kind was loaded.

    Args:
        seed: Where the draws start.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._generator: torch.Generator | None = None
        self._states: dict[str, Tensor] = {}  # by the kind of device

    def generator(self, device: torch.device) -> torch.Generator:
        """Returns the generator on ``device``."""
        if self._generator is None or self._generator.device != device:
            states = self.states()
            self._generator = torch.Generator(device=device)
            if device.type in states:
                self._generator.set_state(states[device.type])
            else:
                self._generator.manual_seed(self.seed)
        return self._generator

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def draw(
        self, below: int, shape: tuple[int, int], device: torch.device, *, moves: bool
    ) -> Tensor:
        """Returns whole numbers in ``[0, below)``; the next draw differs where this one ``moves``.

        A compiled graph breaks here: a generator with a state cannot be part of one.
        """
        generator = self.generator(device)
        state = None if moves else generator.get_state()
        drawn = torch.randint(below, shape, generator=generator, device=device)
        if state is not None:
            generator.set_state(state)
        return drawn

    def states(self) -> dict[str, Tensor]:
        """Returns the states by the kind of device, on the host; reading them waits for nothing."""
        if self._generator is None:
            return self._states
        return {**self._states, self._generator.device.type: self._generator.get_state()}

    def packed(self) -> Tensor:
        """Returns seed and states as one tensor ``(BYTES,)`` uint8 on the host.

        A ``state_dict`` of tensors alone, of sizes that never change, is what averages of weights
        and safetensors can take.
        """
        states = self.states()
        sizes = {kind: len(state) for kind, state in states.items()}
        head = json.dumps({"seed": self.seed, "sizes": sizes}).encode() + b"\n"
        letters = torch.tensor(list(head), dtype=torch.uint8, device="cpu")
        content = torch.cat([letters, *states.values()])
        packed = torch.zeros(BYTES, dtype=torch.uint8, device="cpu")
        packed[: len(content)] = content
        return packed

    def unpack(self, packed: Tensor) -> None:
        """Goes on from what :meth:`packed` returned."""
        packed = packed.cpu()
        head, _, _ = bytes(packed.tolist()).partition(b"\n")
        said, start = json.loads(head), len(head) + 1
        states = {}
        for kind, size in said["sizes"].items():
            states[kind] = packed[start : start + size].clone()
            start += size
        self.load(said["seed"], states)

    def load(self, seed: int, states: dict[str, Tensor]) -> None:
        """Goes on from a saved state."""
        self.seed, self._generator = seed, None
        # map_location moves what belongs on the host.
        self._states = {kind: state.cpu() for kind, state in states.items()}

    # Generators themselves cannot be copied or pickled in every release of torch.
    def __getstate__(self) -> dict[str, Any]:
        return {"seed": self.seed, "states": self.states()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._generator = None
        self.load(state["seed"], state["states"])
