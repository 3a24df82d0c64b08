"""Weights of named parts that change from step to step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from structkd._checks import near, number
from structkd.criteria.base import Criterion

OF_LABELS = ("task", "SRM")  # terms of BridgeLoss and of SupervisionLoss


class Weighted(Criterion):
    """A criterion of named parts, each with a weight.

    Weights are tensors: :meth:`set_weight` changes one from step to step, and a compiled criterion
    is not compiled again. They are configuration and no part of ``state_dict``.
    """

    same_on_all_ranks: ClassVar[tuple[str, ...]] = ("_weights",)
    _weights: Tensor

    def _weigh(self, weights: Mapping[str, float]) -> None:
        """Takes the parts' names and weights; to be called once, by the constructor."""
        self._parts = tuple(weights)
        values = [number("weight", weight) for weight in weights.values()]
        # float64, so that 0.1 is as near to 0.1 as a Python number.
        self.register_buffer(
            "_weights", torch.tensor(values, dtype=torch.float64), persistent=False
        )

    @property
    def weights(self) -> dict[str, float]:
        """The weights by part; reading them waits for the device."""
        return dict(zip(self._parts, self._weights.tolist(), strict=True))

    def _present(self) -> dict[str, Tensor]:
        """Returns the weights by part as scalars that :meth:`set_weight` leaves as they are.

        Autograd may hold them until ``backward()``, and a loop may change a weight before it.
        """
        return dict(zip(self._parts, self._weights.clone().unbind(), strict=True))

    def set_weight(self, name: str, weight: float) -> None:
        """Changes the weight of a part.

        Raises:
            ValueError: If there is no such part, or the weight is not finite.
        """
        if name not in self._parts:
            raise ValueError(
                f"{type(self).__name__} has no part {name!r}; {near(name, self._parts)}"
            )
        self._weights[self._parts.index(name)].fill_(number("weight", weight))


class Share(Weighted):
    """One weight of all that is distilled, beside which the labels' terms keep theirs."""

    def __init__(self) -> None:
        super().__init__()
        self._weigh({"distilled": 1.0})

    def of(self, terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the terms, those that are distilled times the weight."""
        weight = self._present()["distilled"]
        return {
            name: value if name.partition(" (")[0] in OF_LABELS else weight.to(value.dtype) * value
            for name, value in terms.items()
        }
