"""Entropic transport as defined, in plain loops: softmax rows, Dykstra's projections, the value."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor


def softmax_plan(cost: Tensor, epsilon: float, row_mass: Tensor) -> Tensor:
    """The stationary point under row masses alone, entry by entry."""
    rows, columns = cost.shape
    plan = torch.zeros_like(cost)
    for i in range(rows):
        peak = max(-cost[i, j].item() / epsilon for j in range(columns))
        total = sum(math.exp(-cost[i, k].item() / epsilon - peak) for k in range(columns))
        for j in range(columns):
            plan[i, j] = row_mass[i] * math.exp(-cost[i, j].item() / epsilon - peak) / total
    return plan


def capacity_plan(
    cost: Tensor, epsilon: float, row_mass: Tensor, capacity: Tensor, iterations: int = 3000
) -> Tensor:
    """Benamou et al. 2015, Sec. 5: Dykstra's alternating KL projections with their corrections."""
    plan = torch.exp(-cost / epsilon)
    correct_rows, correct_columns = torch.ones_like(cost), torch.ones_like(cost)
    for _ in range(iterations):
        before = plan * correct_rows
        plan = before * (row_mass / before.sum(dim=1))[:, None]
        correct_rows = before / plan
        before = plan * correct_columns
        plan = before * (capacity / before.sum(dim=0)).clamp(max=1)[None, :]
        correct_columns = before / plan
    return plan


def value(plan: Tensor, cost: Tensor, epsilon: float) -> float:
    """The regularised objective, with 0 log 0 = 0."""
    total = 0.0
    for moved, price in zip(plan.flatten().tolist(), cost.flatten().tolist(), strict=True):
        total += moved * price + (epsilon * moved * math.log(moved) if moved > 0 else 0.0)
    return total


def capacity_optimum(cost: Tensor, row_mass: Tensor, capacity: Tensor) -> float:
    """The exact cost without entropy, as a linear programme."""
    rows, columns = cost.shape
    from_row = np.kron(np.eye(rows), np.ones((1, columns)))
    to_column = np.kron(np.ones((1, rows)), np.eye(columns))
    found = linprog(
        cost.flatten().numpy(),
        A_ub=to_column,
        b_ub=capacity.numpy(),
        A_eq=from_row,
        b_eq=row_mass.numpy(),
    )
    assert found.success
    return float(found.fun)
